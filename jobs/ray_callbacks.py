"""What is hooked into Ray Train. Its internals are used here and nowhere else: a UserCallback sees neither the start of
a group of workers nor their main threads."""

from __future__ import annotations

from collections import defaultdict

from ray.train.v2._internal.execution.callback import WorkerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.preemption import PreemptionWatcher
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupContext

from jobs.orders import termination

POLL_SECONDS = 2.0


class NoteTermination(WorkerCallback):
    """SIGTERM to a training worker: noted while it trains."""

    def after_init_train_context(self) -> None:
        """In the worker's main thread, which handles signals; training runs in another one."""
        termination.install()


class WatchPreemptions(WorkerGroupCallback):
    """Tells the workers that a node of theirs will be taken away; they see it by `ray.train.get_preemption_info`.

    It is Ray's own watcher, as a thread of the controller: as the actor that Ray would make of it, it costs a process
    more, and Ray 2.60 logs an error about its arguments whenever it starts.
    """

    def __init__(self) -> None:
        self._watcher: PreemptionWatcher | None = None

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        """In the controller, at every start of workers."""
        self._stop()
        workers = {}
        for worker in worker_group.get_workers():
            assert worker.distributed_context is not None
            workers[worker.distributed_context.world_rank] = worker
        ranks_of_node: dict[str, list[int]] = defaultdict(list)
        for rank, worker in workers.items():
            ranks_of_node[worker.metadata.node_id].append(rank)
        actors = {rank: worker.actor for rank, worker in workers.items()}
        self._watcher = PreemptionWatcher(dict(ranks_of_node), POLL_SECONDS, actors)

    def before_worker_group_shutdown(self, worker_group: WorkerGroup) -> None:
        """They end as they should."""
        self._stop()

    def after_worker_group_abort(self, worker_group_context: WorkerGroupContext) -> None:
        """They are ended."""
        self._stop()

    def _stop(self) -> None:
        if self._watcher:
            self._watcher._stop_event.set()
            self._watcher = None
