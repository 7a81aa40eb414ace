"""The calibrated beta of `dpo` in NCP space, from error statistics."""

from acpo_dist.algorithms.preference import BETA, Dpo
from acpo_dist.objective.noise_space import ErrorStatistics
from acpo_dist.objective.preference import split_pairs


def calibrated_beta(noise: ErrorStatistics, distances: ErrorStatistics) -> float:
    """Beta of `dpo` in NCP space, from the errors of P winners followed by those of their P losers."""

    def gaps(found: ErrorStatistics) -> list[float]:
        winner, loser = split_pairs(found)
        return (winner.reference_error_B - loser.reference_error_B).abs().tolist()

    algorithm = Dpo(Dpo.Config(space="ncp", beta=5000.0))
    return algorithm.calibrate({"noise": gaps(noise), "feature": gaps(distances)})[BETA]
