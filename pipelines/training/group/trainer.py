"""Ray Train's trainer without the processes and settings that raydit's groups do not need.

Each further process of Ray Train takes more than a second of a core to import its modules, while the workers wait. Ray
Train's private methods are used here and nowhere else.
"""

import os
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from cluster.session import LOOPBACK


class GroupTrainer(DataParallelTrainer):
    """Runs a function on a group of workers.

    SIGINT is left to us: Ray Train's handler would keep Ctrl-C for itself and exit with code 1. It has none when `fit`
    runs in another thread, but a thread that waits for Ray while Ray is shut down crashes the process.
    """

    def fit(self) -> Any:
        """Run the function until all workers have returned. Raises TrainingFailedError if one of them fails."""
        try:
            return super().fit()
        finally:
            if _on_one_machine():
                _remove_placement_groups()

    def _register_sigint_handler(self, controller: Any) -> None: ...

    def _create_default_callbacks(self) -> list[Any]:
        """Return Ray Train's callbacks but for those that start a process for Ray data sets, which are not used.

        On one machine another process is left out that removes the resources of a controller that died: `fit` does.
        """
        here = _on_one_machine()
        unused = (DatasetsCallback, PlacementGroupCleanerCallback) if here else (DatasetsCallback,)
        callbacks = [each for each in super()._create_default_callbacks() if not isinstance(each, unused)]
        return [*callbacks, InheritedSettings()] if here else callbacks

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        """Run the controller; on one machine in a process that Ray has started in advance.

        Ray Train asks for a runtime environment of its own, which such a process has not: another one starts, and
        starts Python twice.
        """
        if not _on_one_machine():
            return super()._initialize_and_run_controller(**settings)
        if type(settings["scaling_policy"]) is FixedScalingPolicy:
            settings["scaling_policy"] = OneMachinePolicy(settings["scaling_policy"].scaling_config)
        controller: Any = ray.remote(num_cpus=0)(TrainController).remote(**settings)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())


class InheritedSettings(ControllerCallback):
    """Makes the workers use processes that Ray has started in advance, as the controller does."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Forget Ray Train's variables in the controller, once it has read them; it would hand them to the workers.

        The workers inherit them from the processes that started the controller.
        """
        for name in get_env_vars_to_propagate():
            del os.environ[name]


class OneMachinePolicy(FixedScalingPolicy):
    """A fixed number of workers on a machine, which cannot grow: there is no autoscaler to ask."""

    def _send_resource_request(self) -> None: ...

    def _maybe_send_resource_request(self) -> None: ...

    def _cancel_resource_request(self) -> None: ...


def _on_one_machine() -> bool:
    """Return whether Ray is one on loopback, which no other machine can join."""
    return ray.util.get_node_ip_address() == LOOPBACK


def _remove_placement_groups() -> None:
    """Remove this job's placement groups: those of a controller that died would keep their resources."""
    job = ray.get_runtime_context().get_job_id()
    try:
        for group_id, group in placement_group_table().items():
            if group_id.endswith(job) and group["state"] != "REMOVED":
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id))))
    except RayError:
        pass  # Ray itself has ended
