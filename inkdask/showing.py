"""How things are shown in Jupyter, as `inkdask.view` tells it.

A segment and a prediction can be shown, and the view is made of segments and predictions. So that
no import goes in a circle, they look here for the view, which comes here when inkdask is imported.
"""

from types import ModuleType

view: ModuleType
