"""From the numbers of a few seeds to a verdict, by one rule for all claims.

A claim is about a difference, taken seed by seed: both methods start from the same base and see the
same inputs. Its mean over n seeds has a 95% confidence interval of ± t · s / √n (Student's t).
The verdict is

    yes            the interval is above zero, and the mean is above MARGIN
    no             the interval is below MARGIN: there is no difference that counts
    undecided      anything else: more seeds would tell

MARGIN is the difference that counts: two standard errors of one accuracy near .95 on 400 answers.
"""

import numpy as np

MARGIN = 0.02
CANNOT = "cannot be tested here"
T_95 = (np.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # by n - 1


def interval(values):
    """Mean of the seeds' values, and half the width of its 95% confidence interval."""
    n = len(values)
    t = T_95[n - 1] if n <= len(T_95) else 1.96 + 2.5 / (n - 1)
    return np.mean(values), t * np.std(values, ddof=1) / np.sqrt(n) if n > 1 else np.inf


def more(a, b, margin=MARGIN):
    """The verdict on "a is more than b", for one number per seed each."""
    difference = np.asarray(a, float) - np.asarray(b, float)
    if len(difference) < 2:
        return CANNOT + ": one seed"
    mean, half = interval(difference)
    text = f"({mean:+.2f} ± {half:.2f})"
    if mean - half > 0 and mean > margin:
        return f"yes {text}"
    if mean + half <= margin:
        return f"no {text}"
    return f"undecided {text}"


def kept(after, before, at_least):
    """The verdict on "after is at least that share of before"."""
    return more(after, at_least * np.asarray(before), margin=0)


def against(a, b):
    """The text "0.95 ± 0.03 against 0.22 ± 0.13"."""
    from experiments.runner import mean_and_spread

    return f"{mean_and_spread(a)} against {mean_and_spread(b)}"
