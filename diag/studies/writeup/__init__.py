"""A writeup: a plan in YAML → missing runs measured → figures, tables and captions, the same bytes each time.

    plans = read_plans([Path("configs/demo.yaml")])
    for plan, document in plans:
        outcome = produce(plan, document, Path("figures"))

Importing this does not import torch; neither does drawing a plan of which nothing is missing.
"""

from diag.studies.writeup.needs import Need, needs_of, shows
from diag.studies.writeup.produce import Produced, produce, read_plans

__all__ = ["Need", "Produced", "needs_of", "produce", "read_plans", "shows"]
