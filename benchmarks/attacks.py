"""Our attacks against torchattacks' PGD and the official Auto-PGD of AutoAttack, side by side in one run.

    python benchmarks/attacks.py [--model agft-tiny] [--device cpu] [--rounds 3] [--images 32] [--out results/benchmark_attacks.json]

PGD-20 attacks the untuned model. Auto-PGD attacks a TeCoA student of the model's own preset (fine-tuned here first, unless --student
names a checkpoint), at half the preset's eps and at that eps, where a share of the images survives, and at eight times that,
where none does.
Both sides have the same eps, steps and targets, and only images that are right clean.
Rounds alternate between the sides, each with a random start of its own; the ratio of images a second is the median over rounds.
Forwards are the images that went through the network, for each image attacked. Robust accuracy, from the returned pixels, is the mean
over rounds. On a shared CPU set OMP_NUM_THREADS to the cores that are free, or threads that wait for each other hide everything else.
"""
import argparse, json, statistics, tempfile, time
import torch, torchattacks
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from agft.attack import apgd, apgd_targeted, broken, pgd, pixels
from agft.clip import load_clip
from agft.core import load_preset, seeded, write_json
from agft.data import load_task
from agft.report import machine
from agft.train import finetune

STEPS, TARGETS = 100, 9     # of Auto-PGD


class Classifier(torch.nn.Module):
    "A model with a task's prompts; it counts the images that it is shown."
    def __init__(self, clip, head):
        super().__init__()
        self.clip, self.head, self.seen = clip, head, 0
    def forward(self, x):
        self.seen += len(x)
        return self.clip.logits(x, self.head)


def right_clean(net, task, n, device):
    "The first `n` pictures that the model gets right."
    x, y = task.images[:4*n].to(device)/255, task.labels[:4*n].to(device)
    keep = (~broken(net, x, y)).nonzero()[:n, 0]
    return x[keep], y[keep]


def pgd20(net, x, y, eps):
    theirs = torchattacks.PGD(net, eps=eps, alpha=eps/4, steps=20, random_start=True)
    return (lambda r: pgd(net, x, y, eps, eps/4, 20, seeded(r, 'start'), early_stop=True)), lambda r: theirs(x, y)


def apgd_ce(net, x, y, eps):
    args = dict(n_iter=STEPS, eps=eps, loss='ce', device=x.device)
    return (lambda r: apgd(net, x, y, eps, STEPS, seeded(r, 'start'))), lambda r: APGDAttack(net, seed=r, **args).perturb(x, y)


def apgd_t(net, x, y, eps):
    args = dict(n_iter=STEPS, eps=eps, n_target_classes=TARGETS, device=x.device)
    return ((lambda r: apgd_targeted(net, x, y, eps, STEPS, seeded(r, 'start'), targets=TARGETS)),
            lambda r: APGDAttack_targeted(net, seed=r, **args).perturb(x, y))


def compare(attack, net, x, y, eps, rounds):
    "Speed, forwards and robust accuracy of both sides."
    ours, theirs = attack(net, x, y, eps)
    sides, rates, seen, robust = {'agft': ours, 'theirs': theirs}, {}, {}, {}
    broken(net, x, y)                                                      # warms up
    for r in range(rounds):
        for name, run in sorted(sides.items(), reverse=r % 2 == 1):
            torch.manual_seed(r)
            net.seen, t = 0, time.perf_counter()
            x_adv = run(r)
            if x.is_cuda: torch.cuda.synchronize()
            rates.setdefault(name, []).append(len(x) / (time.perf_counter() - t))
            seen.setdefault(name, []).append(net.seen / len(x))
            robust.setdefault(name, []).append((~broken(net, x_adv, y)).double().mean().item())
    ratios = [o/t for o, t in zip(rates['agft'], rates['theirs'])]
    of = lambda found, digits, mean=statistics.median: {k: round(mean(v), digits) for k, v in found.items()}
    return dict(eps=f'{255*eps:.3g}/255', n=len(x), ratio=round(statistics.median(ratios), 3),
                ratio_range=[round(min(ratios), 3), round(max(ratios), 3)], images_per_second=of(rates, 2),
                forwards_per_image=of(seen, 1), robust_accuracy=of(robust, 4, statistics.mean))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='agft-tiny'); p.add_argument('--device', default='cpu')
    p.add_argument('--rounds', type=int, default=3); p.add_argument('--images', type=int, default=32)
    p.add_argument('--student', help='checkpoint of a robust student'); p.add_argument('--out', default='results/benchmark_attacks.json')
    a = p.parse_args()
    preset, found = load_preset(a.model.removeprefix('agft-')), {}
    if a.student: robust = load_clip(a.student)
    else:
        with tempfile.TemporaryDirectory() as d: robust = finetune(preset, 'TeCoA', d, device=a.device)
    began, task, eps = time.time(), load_task(preset['source'], 8*a.images), pixels(preset['train']['eps'])
    clip = load_clip(a.model).to(a.device)
    head = clip.head(task.classes, task.templates)
    nets = {'untuned': Classifier(clip, head).eval(), 'TeCoA': Classifier(robust.to(a.device), head).eval()}
    cases = [('PGD-20', 'untuned', pgd20, eps)]
    cases += [(name, 'TeCoA', attack, radius) for name, attack in (('APGD-CE', apgd_ce), ('APGD-T', apgd_t))
              for radius in (eps/2, eps, 8*eps)]
    for name, model, attack, radius in cases:
        net = nets[model]
        one = compare(attack, net, *right_clean(net, task, a.images, a.device), radius, a.rounds)
        found[f'{name}, {model}, {one["eps"]}'] = one
        print(name, model, json.dumps(one), flush=True)
    student = f' --student {a.student}' if a.student else ''
    command = f'python benchmarks/attacks.py --model {a.model} --device {a.device} --rounds {a.rounds} --images {a.images}{student}'
    found['about'] = dict(command=command, n=a.rounds, against='torchattacks (PGD-20), pyautoattack (APGD)', machine=machine(a.device),
                          threads=torch.get_num_threads(), seconds=round(time.time() - began, 1))
    write_json(a.out, found)


if __name__ == '__main__': main()
