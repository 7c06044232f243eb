"""Training without raydit: bare torch loops, and the raydit job's reports beside them."""

import multiprocessing
import time

import torch
import torch.distributed as distributed
from torch.nn.parallel import DistributedDataParallel

from pipelines.training.group.messages import Report
from pipelines.training.group.run_workers import run_workers


def bare_loop(pipe, build, rank, num_workers, rendezvous_file, threads):
    """Run the training steps of a carefully written script (fused AdamW, averaged weights, one batch in memory), as
    many as the pipe requests.

    build: returns a network, and a function that maps the network (or its DDP wrapper) to the loss. With several
    workers, the processes train one model with DDP.
    """
    torch.set_num_threads(threads)
    network, loss = build()
    model = network
    if num_workers > 1:
        distributed.init_process_group("gloo", init_method=rendezvous_file, rank=rank, world_size=num_workers)
        model = DistributedDataParallel(network)
    average = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    for steps in iter(pipe.recv, 0):
        for step in range(steps + 2):
            if step == 2:  # the first steps warm up caches
                started = time.perf_counter()
            loss(model).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), float("inf"))
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(average, [parameter.detach() for parameter in network.parameters()], 0.1)
        pipe.send((time.perf_counter() - started) / steps)


class BareLoops:
    """One process per worker, all running at the same time."""

    def __init__(self, build, num_workers, rendezvous_file, threads=1):
        """build: see `bare_loop`; must be picklable. rendezvous_file: path of a file that does not exist yet, for the
        rendezvous of the process group. threads: number of threads of each process.
        """
        spawn = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(num_workers):
            parent_end, child_end = spawn.Pipe()
            work = (child_end, build, rank, num_workers, f"file://{rendezvous_file}", threads)
            process = spawn.Process(target=bare_loop, args=work, daemon=True)
            process.start()
            self.pipes.append(parent_end)
            self.processes.append(process)

    def seconds(self, steps: int) -> float:
        """Run the given number of steps, and return the seconds per step of the slowest process."""
        for pipe in self.pipes:
            pipe.send(steps)
        return max(pipe.recv() for pipe in self.pipes)

    def end(self):
        """Stop all processes."""
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(0)
            process.join()


def alternate_job_and_loops(context, stage, function, rounds, loops, steps, ray_folder):
    """Alternate, in rounds, between running a job up to the steps in the round's settings and running as many steps of
    the bare loops.

    function: what each of the job's workers does. Returns the listener of each round, and the loops' seconds per step.
    """
    listeners, bare = [], []
    for number, settings in enumerate(rounds, start=1):
        listeners.append(Listener())
        on_message = listeners[-1].on_message
        run_workers(context, stage, settings.train, function, settings, on_message, ray_folder=ray_folder)
        assert listeners[-1].reports[-1].step == number * steps
        bare.append(loops.seconds(steps))
    loops.end()
    return listeners, bare


class Listener:
    """Collect the reports of one round, and the time of the first."""

    def __init__(self):
        self.started_at, self.first_report_at, self.reports = time.perf_counter(), 0.0, []

    def on_message(self, message):
        if isinstance(message, Report):
            self.first_report_at = self.first_report_at or time.perf_counter()
            self.reports.append(message)

    def metric(self, name):
        """Return a metric of the last report window; the steps before it are warm-up."""
        return self.reports[-1].metrics[name]
