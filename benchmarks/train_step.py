"""One adversarial training step: agft against the same step written plainly, side by side in one run.

    python benchmarks/train_step.py [--preset tiny] [--device cpu] [--rounds 7]
                                    [--out results/benchmark_train_step.json]

The plain step is what public code does: torchattacks' PGD on the batch's mean loss for TeCoA; for AGFT, whose
target torchattacks cannot take, the same loop with a soft target, and the frozen teacher run on every batch.
Rounds alternate between the two; the ratio of the rates is the median over rounds. Peak memory (on a CPU: of
the whole process) is measured in a process of its own for each side.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
import torchattacks

from agft.config import load_preset, override
from agft.data import batch_indices
from agft.methods import Batch
from agft.report import machine
from agft.results import Results, table
from agft.train import prepare_run

STEPS = 3 # optimizer steps in a round
METHODS = 'TeCoA', 'AGFT'


def setup(preset, method, device):
    "A run on four batches of images, and an optimizer."
    recipe = load_preset(preset)
    config = override(recipe.finetune(method), **{'train.images': 4*recipe.train.batch_size})
    run = prepare_run(config, device)
    params = [p for p in run.models.student.parameters() if p.requires_grad]
    return run, torch.optim.SGD(params, lr=1e-5, momentum=0.9)


def ours(preset, method, device):
    "agft's step, and the images in it."
    run, optimizer = setup(preset, method, device)
    loss_fn = run.loss_fn()
    def step(t):
        optimizer.zero_grad()
        loss_fn(t)[0].backward()
        optimizer.step()
    return step, run.config.train.batch_size


class Classifier(torch.nn.Module):
    "Scaled cosines as the module that torchattacks asks for."
    def __init__(self, clip, head, logit_scale):
        super().__init__()
        self.clip, self.head, self.logit_scale = clip, head, logit_scale
    def forward(self, x): return self.logit_scale * self.clip.cosines(x, self.head)


def soft_pgd(classifier, x, target, attack):
    "PGD on the mean cross-entropy with a soft target."
    x_adv = (x + torch.empty_like(x).uniform_(-attack.eps, attack.eps)).clamp(0, 1)
    for _ in range(attack.steps):
        x_adv.requires_grad = True
        grad, = torch.autograd.grad(F.cross_entropy(classifier(x_adv), target), x_adv)
        delta = (x_adv.detach() + attack.step*grad.sign() - x).clamp(-attack.eps, attack.eps)
        x_adv = (x + delta).clamp(0, 1).detach()
    return x_adv


def plain(preset, method, device):
    "The same step without agft, and the images in it."
    run, optimizer = setup(preset, method, device)
    attack, batch_size = run.config.attack, run.config.train.batch_size
    student, teacher, head = run.models
    classifier = Classifier(student, head, run.method.logit_scale).eval()
    label_pgd = torchattacks.PGD(classifier, attack.eps, attack.step, attack.steps, random_start=True)
    labels = run.task.require_labels()
    def step(t):
        indices = batch_indices(len(run.task), batch_size, t)
        x, y = run.task.images[indices].to(device)/255, labels[indices].to(device)
        if method == 'TeCoA':
            target, x_adv = y, label_pgd(x, y)
        else:
            with torch.no_grad():
                target = run.method.target(run.models, Batch(x, y, teacher.encode_image(x)))
            x_adv = soft_pgd(classifier, x, target, attack)
        optimizer.zero_grad()
        F.cross_entropy(classifier(x_adv), target).backward()
        optimizer.step()
    return step, batch_size


SIDES = {'agft': ours, 'plain': plain}


def print_peak(side, preset, method, device):
    "Print the peak memory of three steps, MiB: allocated on a GPU, of the process on a CPU."
    import resource
    step, _ = SIDES[side](preset, method, device)
    for t in range(3):
        step(t)
    if device == 'cpu':
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**10)
    else:
        print(torch.cuda.max_memory_allocated()/2**20)


def peak_mib(side, preset, method, device):
    "Peak memory of one side in a process of its own."
    line = [sys.executable, __file__, '--peak', side, method, '--preset', preset, '--device', device]
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
    return round(float(done.stdout.split()[-1]))


def images_per_second(preset, method, device, rounds):
    "The rates of both sides, one a round, in alternating order."
    sides = {name: make(preset, method, device) for name, make in SIDES.items()}
    rates = {name: [] for name in sides}
    for r in range(-1, rounds):                                        # round -1 warms up
        for name, (step, batch_size) in sorted(sides.items(), reverse=r % 2 == 0):
            began = time.perf_counter()
            for s in range(STEPS):
                step(STEPS*(r + 1) + s)
            if device != 'cpu':
                torch.cuda.synchronize()
            if r >= 0:
                rates[name].append(STEPS*batch_size/(time.perf_counter() - began))
    return rates


def row(method, rates, peaks):
    "What the table holds of one method."
    ratios = [own/other for own, other in zip(rates['agft'], rates['plain'], strict=True)]
    numbers = dict(method=method, ratio=statistics.median(ratios), low=min(ratios), high=max(ratios))
    numbers = {name: value if name == 'method' else round(value, 3) for name, value in numbers.items()}
    for side in SIDES:
        numbers[f'images_per_second_{side}'] = round(statistics.median(rates[side]), 1)
    for side in SIDES:
        numbers[f'peak_mib_{side}'] = peaks[side]
    return dict(**numbers, peak_ratio=round(peaks['agft']/peaks['plain'], 3))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--preset', default='tiny')
    p.add_argument('--device', default='cpu')
    p.add_argument('--rounds', type=int, default=7)
    p.add_argument('--out', default='results/benchmark_train_step.json')
    p.add_argument('--peak', nargs=2, help=argparse.SUPPRESS) # side and method, for one process
    a = p.parse_args()
    if a.peak:
        print_peak(a.peak[0], a.preset, a.peak[1], a.device)
        return
    began, rows, peaks = time.time(), [], {}
    for method in METHODS: # first: on Linux a process starts with the peak of the process that starts it
        peaks[method] = {side: peak_mib(side, a.preset, method, a.device) for side in SIDES}
    for method in METHODS:
        rates = images_per_second(a.preset, method, a.device, a.rounds)
        rows.append(row(method, rates, peaks[method]))
        print(json.dumps(rows[-1]), flush=True)
    command = f'python benchmarks/train_step.py --preset {a.preset} --device {a.device} --rounds {a.rounds}'
    seconds = round(time.time() - began, 1)
    about = dict(command=command, n=a.rounds, machine=machine(a.device), seconds=seconds)
    Results.from_records([], about=about, tables=dict(train_step=table(rows))).save(a.out)


if __name__ == '__main__':
    main()
