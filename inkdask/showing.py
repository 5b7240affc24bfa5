"""Where a segment and a prediction find `inkdask.view`, without a circle of imports.

The view is made of segments and predictions, and both can be shown. `inkdask.view` puts itself here
when inkdask is imported.
"""

from types import ModuleType

view: ModuleType
