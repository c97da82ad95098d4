"""A training step in several processes: how much time do they save, and what does averaging cost?

    python benchmarks/scale.py [--preset tiny] [--device cpu] [--processes 1,2] [--rounds 3]
                               [--out results/benchmark_scale.json]

Every number of processes trains AGFT at the preset's batch (its images are shared out), and at the preset's
batch for each process. `speedup` is the time of one process divided by the time of all for the same images,
and `efficiency` is that divided by the number of processes. `overhead` is the time of a step of n processes
less that of one process with its share of the batch: what the averaging of gradients and the waiting cost.
On a CPU a process has one thread, and the processes talk through gloo; on GPUs each has a GPU of its own.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch

from agft.config import load_preset, override
from agft.core import keep_freed_memory, launched, pick_device
from agft.loop import Stepper
from agft.report import machine
from agft.results import Results, table
from agft.train import prepare_run

STEPS = 10 # that are timed, after two that are not


def measure(preset, device, batch):
    "Print the median time of a step, milliseconds; the first process does."
    keep_freed_memory()
    recipe = load_preset(preset)
    config = override(recipe.finetune('AGFT'), **{'train.images': 2*batch, 'train.batch_size': batch})
    run = prepare_run(config, device if launched()[1] == 1 else 'auto')
    stepper, loss_fn = Stepper(run.models.student, run.config.train, 1e-5), run.loss_fn()
    seconds = []
    for t in range(STEPS + 2):
        began = time.perf_counter()
        stepper(t, loss_fn)  # ends when the numbers of all processes are there
        seconds.append(time.perf_counter() - began)
    if launched()[0] == 0:
        print(json.dumps(1000*statistics.median(seconds[2:])))


def step_time(a, n, batch):
    "The time of a step of n processes, measured in processes of their own, milliseconds."
    launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={n}'] if n > 1 else []
    words = [sys.executable, *launch, __file__, '--preset', a.preset, '--device', a.device, '--batch', batch]
    env = dict(os.environ, OMP_NUM_THREADS='1')
    done = subprocess.run([*map(str, words)], env=env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--preset', default='tiny')
    p.add_argument('--device', default='cpu')
    p.add_argument('--processes', help='numbers of processes (default: 1 to all GPUs; 1,2 on a CPU)')
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--out', default='results/benchmark_scale.json')
    p.add_argument('--batch', type=int, help=argparse.SUPPRESS) # of one measurement
    a = p.parse_args()
    if a.batch:
        measure(a.preset, a.device, a.batch)
        return
    began, batch = time.time(), load_preset(a.preset).train.batch_size
    most = torch.cuda.device_count() if pick_device(a.device).type == 'cuda' else 2
    numbers = [int(n) for n in a.processes.split(',')] if a.processes else [1, *range(2, most + 1, 2)]
    times = {}
    for _ in range(a.rounds):  # in turn, so that a slow minute meets all of them
        for n in numbers:
            for processes, images in {(n, batch), (n, n*batch), (1, batch//n)}:
                times.setdefault((processes, images), []).append(step_time(a, processes, images))
    step, rows = {key: statistics.median(found) for key, found in times.items()}, []
    for n in numbers:
        strong, weak = step[1, batch]/step[n, batch], n*step[1, batch]/step[n, n*batch]
        rows.append(dict(
            processes=n,
            milliseconds=round(step[n, batch], 1), speedup=round(strong, 3), efficiency=round(strong/n, 3),
            overhead_milliseconds=round(step[n, batch] - step[1, batch//n], 1),
            milliseconds_larger_batch=round(step[n, n*batch], 1), efficiency_larger_batch=round(weak/n, 3)))
        print(json.dumps(rows[-1]), flush=True)
    options = f'--preset {a.preset} --device {a.device} --processes {",".join(map(str, numbers))}'
    about = dict(command=f'python benchmarks/scale.py {options} --rounds {a.rounds}', n=a.rounds, batch=batch,
                 machine=machine(pick_device(a.device)), seconds=round(time.time() - began, 1))
    Results.from_records([], about=about, tables=dict(scale=table(rows))).save(a.out)


if __name__ == '__main__':
    main()
