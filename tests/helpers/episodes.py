"""Short runs for the tests of whole episodes."""

from esper_train import RunConfig, TelemetryHub, run_heuristic_episode
from tests.helpers.scripted import Recorder, Script

# With this run seed, the seeds that grow contribute.
SHORT = RunConfig(task="synthetic", max_epochs=6, max_batches=4, seed=2, keep="last")


def scripted(config: RunConfig, policy: Script, **kwargs: object) -> tuple[object, Recorder]:
    recorder = Recorder()
    result = run_heuristic_episode(config, policy=policy, hub=TelemetryHub([recorder]), **kwargs)  # type: ignore[arg-type]
    return result, recorder
