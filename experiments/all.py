"""Every experiment on the toy's worlds, one after the other.

    python -m experiments.all --seeds 5

A finished arm is not run again: after an interruption, or for more seeds, give the same command.
Each result has its "seconds", summed over processes. With names behind it, only these.
"""

from experiments import runner
from experiments.bases import COLD_START, SCALING
from experiments.demonstrations import DEMONSTRATIONS, MISMATCH, REASONING
from experiments.forgetting_law import FORGETTING_LAW
from experiments.kl import ESTIMATORS, KL
from experiments.knowledge import CONTEXT, KNOWLEDGE
from experiments.on_policy import CONTROLS, ON_POLICY
from experiments.pareto import PARETO, ROTATED
from experiments.pass_at_k import PASS_AT_K
from experiments.real_controls import REAL_CONTROLS, REAL_GRID, TWO_BY_TWO
from experiments.real_model import REAL_MODEL
from experiments.search import SEARCH, SEARCH_RATES
from experiments.sequential import MANY_STAGES, SEQUENTIAL, TOY
from experiments.teacher import TEACHER, TEACHER_WEIGHTS

EXPERIMENTS = [TOY, TEACHER, PARETO, ROTATED, SEQUENTIAL, DEMONSTRATIONS, KNOWLEDGE, CONTEXT]
EXPERIMENTS += [REASONING, CONTROLS, COLD_START, ON_POLICY, KL, ESTIMATORS, TEACHER_WEIGHTS]
EXPERIMENTS += [MANY_STAGES, MISMATCH, SCALING, PASS_AT_K, SEARCH_RATES, SEARCH]
REPORTED = [*EXPERIMENTS, FORGETTING_LAW, REAL_GRID, REAL_MODEL, REAL_CONTROLS, TWO_BY_TWO]

if __name__ == "__main__":
    runner.main(__doc__, *EXPERIMENTS)
