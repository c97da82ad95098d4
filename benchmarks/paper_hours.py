"""What the paper's run would take: ViT-B/32, AGFT, ten epochs of ImageNet, batches of 256. An estimate.

    python benchmarks/paper_hours.py [--out results/paper_hours.json]

Measured here, in fp32: the floating-point operations of a step (counted by torch), the time of a step on
this CPU, and the peak memory of a process at two batch sizes, from which that at 256 images is
extrapolated. Nothing depends on what the weights and the images are, so both are random. Estimated: the
hours on named GPUs, as operations divided by the maker's peak rate (dense, bfloat16) times a utilisation of
30 percent, which training of vision transformers of this size commonly has. Once `results/speed_gpu.json`
is there, its measured utilisation is used.
"""
import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from torch.utils.flop_counter import FlopCounterMode
from train_step import noise_task

from agft.config import load_preset, override
from agft.core import keep_freed_memory
from agft.loop import Stepper
from agft.report import machine
from agft.results import Results, table
from agft.train import prepare_run
from agft.weights import new_model

PEAKS = {'NVIDIA A100': 312, 'NVIDIA H100 SXM': 989, 'NVIDIA RTX 4090': 165} # TFLOP/s, from the data sheets
UTILISATION = .3
GPUS = 1, 2, 8


def step_of(batch):
    "A training step of that many random images, and the settings of the preset."
    recipe = load_preset('vit_b32_imagenet')
    few = {'train.batch_size': batch, 'train.images': None, 'train.precision': 'fp32'}
    config = override(recipe.finetune('AGFT'), **few)
    model = new_model(config.model.name.split('@')[0])
    task = noise_task(batch, 224, 1000)
    run = prepare_run(config, 'cpu', model, task)
    stepper, loss_fn = Stepper(run.models.student, run.config.train, 1e-5), run.loss_fn()
    return lambda t: stepper(t, loss_fn), config


def measure(batch):
    "Print operations, seconds and peak memory of a step."
    keep_freed_memory()
    step, config = step_of(batch)
    with FlopCounterMode(display=False) as counter:
        step(0)
    seconds = []
    for t in range(1, 4):
        began = time.perf_counter()
        step(t)
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
    print(json.dumps(dict(batch=batch, gflop_an_image=counter.get_total_flops()/batch/1e9,
                          seconds_a_step=sorted(seconds)[1], peak_gib=peak, steps=config.train.steps)))


def measured(batch):
    "What a process of its own prints."
    line = [sys.executable, __file__, '--batch', str(batch)]
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found), flush=True)
    return found


def utilisation():
    "Of a GPU: measured, if it has been, and where the number comes from."
    path = Path('results/speed_gpu.json')
    if not path.is_file():
        return UTILISATION, 'assumed'
    return float(Results.load(path).tables['kernels'].utilisation.max()), f'measured, {path}'


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', default='results/paper_hours.json')
    p.add_argument('--batch', type=int, help=argparse.SUPPRESS) # of one measurement
    a = p.parse_args()
    if a.batch:
        measure(a.batch)
        return
    began, small, large = time.time(), measured(4), measured(16)
    images = large['steps']*256
    an_image = (large['peak_gib'] - small['peak_gib'])/(large['batch'] - small['batch'])
    fixed = large['peak_gib'] - large['batch']*an_image
    share, origin = utilisation()
    memory, an_hour = fixed + 256*an_image, 3600*large['batch']/large['seconds_a_step']
    rows = [dict(hardware=machine('cpu'), processors=1, hours=round(images/an_hour),
                 memory_gib=round(memory, 1), what=f'extrapolated from 3 steps of {large["batch"]}')]
    for name, peak in PEAKS.items():
        for n in GPUS:
            hours = images*large['gflop_an_image']/(n*share*peak*1e3)/3600
            rows.append(dict(hardware=name, processors=n, hours=round(hours, 1),
                             memory_gib=round(fixed + 256/n*an_image, 1),
                             what=f'estimate: {peak} TFLOP/s, utilisation {share:.0%} ({origin})'))
    about = dict(command='python benchmarks/paper_hours.py', steps=large['steps'], batch=256,
                 machine=machine('cpu'), seconds=round(time.time() - began, 1))
    tables = dict(paper_hours=table(rows), measured=table([small, large]))
    Results.from_records([], about=about, tables=tables).save(a.out)


if __name__ == '__main__':
    main()
