"""What our own tests stand on, public, so that you can hold your kernels and loops to the same laws.

- `exact_law`: the distribution of an op to 1e-15 instead of to the noise of a histogram, by bisecting its uniforms;
  `random_model`, `sequence_law`, `speculative_law`: the law that it must have; `law_error` compares the two.
- `chi_square_z`: for what is too large, or draws its own random numbers.
- `reference`: every op on one row or request at a time, in NumPy long double, and the random-number contract.
- `models`, `drafters`: scripted, noisy and broken ones, whose output or law is known.

Does this kernel keep the target's law? A verifier of one draft token, and the test:

>>> import numpy as np
>>> from fastdecode.testing import exact_law, law_error, sequence_law, speculative_law
>>> target, draft = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
>>> def verify(case, uniforms):  # one call, many rows: row r verifies draft token case[r] with uniforms[r]
...     accepted = uniforms[:, 0] * draft[case] < target[case]
...     residual = np.cumsum(np.maximum(target - draft, 0))
...     redrawn = np.searchsorted(residual / residual[-1], uniforms[:, 1], side="right")
...     return np.where(accepted, case, redrawn)[:, None]
>>> laws = exact_law(verify, num_uniforms=2, num_cases=3)  # what is emitted for each draft token
>>> emitted = speculative_law(list(zip(draft, laws)), lambda context: target, length=1)
>>> law_error(emitted, sequence_law(lambda context: target, length=1)) < 1e-12
True

It needs NumPy and torch only, no test framework.
"""

from . import drafters, models, reference
from .chi_square import chi_square_z, pooled_bins
from .law import Law, Model, Outcome, exact_law, law_error, random_model, sequence_law, speculative_law

__all__ = [
    "Law",
    "Model",
    "Outcome",
    "chi_square_z",
    "drafters",
    "exact_law",
    "law_error",
    "models",
    "pooled_bins",
    "random_model",
    "reference",
    "sequence_law",
    "speculative_law",
]
