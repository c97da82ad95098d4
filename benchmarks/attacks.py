"""Our attacks against torchattacks' PGD and the official code of AutoAttack, measured in one run.

    python benchmarks/attacks.py [--model agft-tiny] [--device cpu] [--rounds 3] [--images 32]
                                 [--student CHECKPOINT] [--out results/benchmark_attacks.json]

PGD-20 attacks the untuned model. Auto-PGD attacks a TeCoA student at three radii: half of the preset's eps
and the preset's eps, where some images stay robust, and eight times the preset's eps, where none does.
AutoAttack attacks the student at the preset's eps; agft runs the official code there. The student is
fine-tuned here with the model's own preset unless --student names a checkpoint.

Both sides have the same eps, steps and targets, and only images that are correct clean. The rounds alternate
between the sides. Each round has its own random start. The ratio of images a second is the median over the
rounds, with the lowest and the highest. On a CPU, a second is one of the process's CPU time, which other
programs on the machine change little; on a GPU it is one of wall time. Forwards are the images that went
through the network, for each image attacked. Robust accuracy is computed from the returned pixels and is the
mean over the rounds. On a shared CPU, set OMP_NUM_THREADS=1: threads that wait for each other hide all
differences.
"""
import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import torchattacks
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

from agft.attack import apgd, apgd_targeted, misclassified
from agft.config import load_preset
from agft.core import seeded
from agft.data import load_task
from agft.report import machine
from agft.results import Results, table
from agft.threats import autoattack, pgd20
from agft.train import finetune
from agft.weights import load_model

STEPS, TARGETS = 100, 9  # of Auto-PGD


class Classifier(torch.nn.Module):
    "A model with a task's prompts; it counts the images that pass through it."
    def __init__(self, clip, head):
        super().__init__()
        self.clip, self.head, self.forwards = clip, head, 0

    def forward(self, x):
        self.forwards += len(x)
        return self.clip.logits(x, self.head)


def correct_images(net, task, n, device):
    "The first `n` images that the model classifies correctly, and their labels."
    x, y = task.images[:4*n].to(device)/255, task.labels[:4*n].to(device)
    keep = (~misclassified(net, x, y)).nonzero()[:n, 0]
    return x[keep], y[keep]


def compare_pgd20(net, x, y, eps):
    "PGD-20 of agft and of torchattacks: functions of the round."
    official = torchattacks.PGD(net, eps=eps, alpha=eps/4, steps=20, random_start=True)
    def ours(r): return pgd20(net, x, y, eps, 'Linf', seeded(r, 'start'))
    def theirs(r): return official(x, y)
    return ours, theirs


def compare_apgd_ce(net, x, y, eps):
    "Auto-PGD on the cross-entropy, of agft and of AutoAttack: functions of the round."
    settings:dict[str, Any] = dict(n_iter=STEPS, eps=eps, loss='ce', device=x.device)
    def ours(r): return apgd(net, x, y, eps, STEPS, seeded(r, 'start'))
    def theirs(r): return APGDAttack(net, seed=r, **settings).perturb(x, y)
    return ours, theirs


def compare_apgd_t(net, x, y, eps):
    "Targeted Auto-PGD, of agft and of AutoAttack: functions of the round."
    settings:dict[str, Any] = dict(n_iter=STEPS, eps=eps, n_target_classes=TARGETS, device=x.device)
    def ours(r): return apgd_targeted(net, x, y, eps, STEPS, seeded(r, 'start'), targets=TARGETS)
    def theirs(r): return APGDAttack_targeted(net, seed=r, **settings).perturb(x, y)
    return ours, theirs


def compare_autoattack(net, x, y, eps):
    "AutoAttack, of agft and as its authors run it: functions of the round."
    def ours(r): return autoattack(net, x, y, eps, 'Linf', seeded(r, 'start'))
    def theirs(r):
        official = AutoAttack(net, norm='Linf', eps=eps, seed=r, device=x.device)
        official.verbose = False
        return official.run_standard_evaluation(x, y, batch_size=len(x))[0]
    return ours, theirs


@dataclass
class Round:
    "What is measured of one side in one round."
    rate:float     # images a second
    forwards:float # for each image attacked
    robust:float   # accuracy on the returned pixels, in [0,1]


def measure(attack, r, net, x, y):
    "One round of one side."
    torch.manual_seed(r)
    clock = time.perf_counter if x.is_cuda else time.process_time
    net.forwards, began = 0, clock()
    x_adv = attack(r)
    if x.is_cuda:
        torch.cuda.synchronize()
    rate = len(x)/(clock() - began)
    forwards = net.forwards/len(x)
    return Round(rate, forwards, (~misclassified(net, x_adv, y)).double().mean().item())


# of each side: name of the column, field of `Round`, digits, average over the rounds
COLUMNS = (('images_per_second', 'rate', 2, statistics.median),
           ('forwards_per_image', 'forwards', 1, statistics.median),
           ('robust_accuracy', 'robust', 4, statistics.mean))


def compare(ours, theirs, net, x, y, eps, rounds):
    "Speed, forwards and robust accuracy of both sides."
    attacks, measured = {'agft': ours, 'theirs': theirs}, {'agft': [], 'theirs': []}
    misclassified(net, x, y)  # warms up
    for r in range(rounds):
        order = sorted(attacks, reverse=r % 2 == 1)
        for name in order:
            measured[name].append(measure(attacks[name], r, net, x, y))
    ratios = [one.rate/other.rate for one, other in zip(*measured.values(), strict=True)]
    ratios = dict(ratio=statistics.median(ratios), low=min(ratios), high=max(ratios))
    row = dict(eps=f'{255*eps:.3g}/255', n=len(x)) | {name: round(ratio, 3) for name, ratio in ratios.items()}
    for name, field, digits, average in COLUMNS:
        for side, rounds in measured.items():
            row[f'{name}_{side}'] = round(average(map(attrgetter(field), rounds)), digits)
    return row


def parse_arguments():
    "The command line."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='agft-tiny', help='a model of the package')
    p.add_argument('--device', default='cpu')
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--images', type=int, default=32)
    p.add_argument('--student', help='checkpoint of a robust student')
    p.add_argument('--out', default='results/benchmark_attacks.json')
    return p.parse_args()


def load_student(a, recipe):
    "The TeCoA student: the checkpoint that is named, or one that is fine-tuned now."
    if a.student:
        return load_model(a.student)
    with tempfile.TemporaryDirectory() as folder:
        return finetune(recipe.finetune('TeCoA'), Path(folder)/'TeCoA', device=a.device)


def main():
    a = parse_arguments()
    recipe = load_preset(a.model.removeprefix('agft-'))
    student = load_student(a, recipe)
    began, task, eps = time.time(), load_task(recipe.data.source, 8*a.images), recipe.attack.eps
    clip = load_model(a.model).to(a.device)
    head = clip.head(task.classes, task.templates)
    untuned, tecoa = Classifier(clip, head).eval(), Classifier(student.to(a.device), head).eval()
    cases, rows = [('PGD-20', 'untuned', untuned, compare_pgd20, eps)], []
    for name, both in (('APGD-CE', compare_apgd_ce), ('APGD-T', compare_apgd_t)):
        for radius in (eps/2, eps, 8*eps):
            cases.append((name, 'TeCoA', tecoa, both, radius))
    cases.append(('AutoAttack', 'TeCoA', tecoa, compare_autoattack, eps))
    for name, model, net, both, radius in cases:
        x, y = correct_images(net, task, a.images, a.device)
        row = compare(*both(net, x, y, radius), net, x, y, radius, a.rounds)
        rows.append(dict(attack=name, model=model, **row))
        print(json.dumps(rows[-1]), flush=True)
    threads = os.environ.get('OMP_NUM_THREADS')
    command = f'OMP_NUM_THREADS={threads} ' if threads else ''
    command += f'python benchmarks/attacks.py --model {a.model} --device {a.device} --rounds {a.rounds} '
    command += f'--images {a.images}' + (f' --student {a.student}' if a.student else '')
    about = dict(command=command, n=a.rounds, against='torchattacks (PGD-20), pyautoattack (the others)',
                 machine=machine(a.device), threads=torch.get_num_threads(),
                 seconds=round(time.time() - began, 1))
    Results.from_records([], about=about, tables=dict(attacks=table(rows))).save(a.out)


if __name__ == '__main__':
    main()
