"""The jobs of a sweep as tasks of a Ray cluster: Hydra's ``ray`` launcher (docs/clusters.md).

Every job runs in the folder in which the sweep was started, which all nodes must share, and has
its own result: one that fails or is lost takes nothing from the others.  Ray starts a job again,
elsewhere, when its node or its process died or was preempted.  What job 3 prints goes to
``job_3.log`` in the sweep's folder: through Ray the lines of all jobs would mix.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from loratune import __version__
from loratune.config.secrets import redact_text
from loratune.console import say
from loratune.errors import (
    ConfigError,
    Interrupted,
    LoratuneError,
    Preempted,
    StorageError,
    TrainingError,
    raise_together,
)

if TYPE_CHECKING:
    from hydra_plugins.loratune_ray import RayLauncher

SAVING_SECONDS = 60.0
"""How long Ctrl-C waits for the jobs to save."""
ANSWER_SECONDS = 10.0
"""How long a cluster may take to answer; Ray itself asks a port that is closed for 13 minutes."""
_SETTINGS = {
    "_target_": "hydra_plugins.loratune_ray.RayLauncher",
    "ray": {
        # address: None takes this machine's cluster, or starts one for this sweep alone
        "init": {"address": None, "log_to_driver": False},
        "remote": {"num_cpus": 1, "num_gpus": None, "max_retries": 3},
    },
}


def register() -> None:
    """Make ``hydra/launcher=ray`` this launcher, where Hydra's plugin of that name is there too."""
    Plugins.instance()  # which registers the plugins: what comes last counts
    ConfigStore.instance().store(group="hydra/launcher", name="ray", node=_SETTINGS)


@dataclass(frozen=True)
class Place:
    """Where a sweep was started, and by what.

    Attributes:
        folder: the working folder.
        sweep: the sweep's folder.
        version: loratune's.
    """

    folder: Path
    sweep: Path
    version: str

    def enter(self) -> None:
        """Work in the folder that the sweep was started in.

        Raises:
            ConfigError: if this node has another loratune.
            StorageError: if it does not see the folder.
        """
        node = f"node {socket.gethostname()}"
        if self.version != __version__:
            cause = f"the sweep was started by loratune {self.version}, this is {__version__}"
            raise ConfigError(cause, where=node, fix="install one version on all nodes")
        if not (self.sweep / "multirun.yaml").is_file():
            fix = "start the sweep in a folder that all nodes have under the same path"
            raise StorageError(f"no folder {self.sweep} here", where=node, fix=fix)
        os.chdir(self.folder)


def run_jobs(
    launcher: RayLauncher, job_overrides: Sequence[Sequence[str]], first: int
) -> list[JobReturn]:
    """Run one batch of a sweep's jobs on the cluster, and wait for all of them.

    Raises:
        LoratuneError: every failed job's, or the cluster's.
        Interrupted: on SIGINT, after the jobs had time to save.
    """
    settings: Any = OmegaConf.to_container(launcher.ray, resolve=True)
    ray = _connected(settings["init"])
    sweep = Path(str(launcher.config.hydra.sweep.dir))
    task = ray.remote(retry_exceptions=[Preempted], **settings["remote"])(run_one)
    place = Place(Path.cwd(), sweep.absolute(), __version__)
    jobs = {}
    for number, overrides in enumerate(job_overrides, first):
        name = f"job {number} ({redact_text(' '.join(filter_overrides(overrides)))})"
        say(f"{name}: {sweep}/job_{number}.log")
        jobs[name] = _submitted(task, place, launcher, overrides, number)
    try:
        results = [_result(ray, name, job) for name, job in jobs.items()]
    except KeyboardInterrupt:
        _stop(ray, list(jobs.values()))
        fix = f"go on: the same command with hydra.sweep.dir={sweep} and resume=auto"
        raise Interrupted("interrupted", where=str(sweep), fix=fix) from None
    failed = [result for result in results if result.status is JobStatus.FAILED]
    errors = [result._return_value for result in failed]
    raise_together(error for error in errors if isinstance(error, LoratuneError))
    return results  # Hydra raises an error of any other kind


def _submitted(
    task: Any, place: Place, launcher: RayLauncher, overrides: Sequence[str], number: int
) -> Any:
    """A job, handed to Ray; returns what its result is asked for with."""
    context = launcher.hydra_context
    config = context.config_loader.load_sweep_config(launcher.config, list(overrides))
    with open_dict(config):
        config.hydra.job.id = config.hydra.job.num = number
    return task.remote(place, context, launcher.task_function, config, Singleton.get_state())


def run_one(
    place: Place,
    context: HydraContext,
    task_function: TaskFunction,
    config: DictConfig,
    singletons: Any,
) -> JobReturn:
    """One job, on its node.

    Raises:
        Preempted: after SIGTERM, so that Ray starts the job again.
    """
    import ray

    try:
        place.enter()
    except LoratuneError as error:
        return _failed(error)
    setup_globals()
    Singleton.set_state(singletons)
    path = place.sweep / f"job_{config.hydra.job.num}.log"
    with path.open("a", encoding="utf-8", buffering=1) as log, contextlib.ExitStack() as streams:
        streams.enter_context(contextlib.redirect_stdout(log))
        streams.enter_context(contextlib.redirect_stderr(log))
        print(f"node {ray.util.get_node_ip_address()}, process {os.getpid()}")
        result = run_job(
            hydra_context=context,
            task_function=task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        failure = result._return_value if result.status is JobStatus.FAILED else None
        if isinstance(failure, LoratuneError):
            print("\n".join(failure.lines()))
        elif failure is not None:
            traceback.print_exception(failure)
    if isinstance(failure, Preempted):
        raise failure
    return result


def _connected(settings: dict[str, Any]) -> Any:
    """Ray, connected to its cluster.

    Raises:
        ConfigError: if it is not installed, or there is no such cluster.
    """
    try:
        import ray
    except ImportError:
        fix = "pip install 'loratune[ray]'"
        raise ConfigError("Ray is not installed", where="hydra/launcher=ray", fix=fix) from None
    if not ray.is_initialized():
        try:
            _require_answer(str(settings["address"]))
            ray.init(**settings)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            cause = f"no connection to Ray: {str(error).splitlines()[0]}"
            where = f"hydra.launcher.ray.init.address={settings['address']}"
            raise ConfigError(cause, where=where, fix="start it: ray start --head") from error
    return ray


def _require_answer(address: str) -> None:
    """Check that somebody listens at ``HOST:PORT``; other addresses Ray looks up itself.

    Raises:
        OSError: if nobody does.
    """
    if found := re.fullmatch(r"(?:ray://)?([^:/]+):(\d{1,5})", address):
        socket.create_connection((found[1], int(found[2])), timeout=ANSWER_SECONDS).close()


def _result(ray: Any, name: str, job: Any) -> JobReturn:
    """How a job ended; one that Ray lost has failed like any other."""
    try:
        result: JobReturn = ray.get(job)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if not isinstance(cause, LoratuneError):
            text = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
            fix = "go on: the same command with the same hydra.sweep.dir and resume=auto"
            cause = TrainingError(f"lost: {text}", where=name, fix=fix)
        return _failed(cause)
    return result


def _failed(error: LoratuneError) -> JobReturn:
    return JobReturn(_return_value=error, status=JobStatus.FAILED)


def _stop(ray: Any, jobs: Sequence[Any]) -> None:
    """Interrupt the jobs, as Ctrl-C would here, and wait while they save."""
    for job in jobs:
        ray.cancel(job)
    ray.wait(jobs, num_returns=len(jobs), timeout=SAVING_SECONDS)
