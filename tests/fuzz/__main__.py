"""``python -m tests.fuzz --inputs N --seed S``: spoiled inputs; ``jobs``: random jobs."""

import sys

from tests.fuzz import campaign

if __name__ == "__main__":
    if sys.argv[1:2] == ["jobs"]:
        from tests.fuzz import jobs

        jobs.main(sys.argv[2:])
    else:
        campaign.main()
