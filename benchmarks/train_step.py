"""One adversarial training step: agft against the same step written plainly, side by side in one run.

    python benchmarks/train_step.py [--preset tiny] [--device cpu] [--rounds 7] [--out results/benchmark_train_step.json]

The plain step is what public code does: torchattacks' PGD on the batch's mean loss for TeCoA; for AGFT, whose target
torchattacks cannot take, the same loop with a soft target and the frozen teacher run on every batch.
Rounds alternate between the two; the ratio is the median over rounds. Peak memory (on a CPU: of the whole process) is measured in a process of its own each.
"""
import argparse, json, statistics, subprocess, sys, time
from pathlib import Path
import torch, torch.nn.functional as F, torchattacks
from agft.attack import pixels
from agft.core import load_preset, write_json
from agft.data import batch_indices
from agft.methods import Batch
from agft.report import machine
from agft.train import loss_of, planned

STEPS = 3   # optimizer steps in a round


def setup(preset, method, device):
    preset = load_preset(preset)
    preset['train']['images'] = 4*preset['train']['batch_size']
    run = planned(preset, method, device=device)
    return run, torch.optim.SGD([p for p in run.models.student.parameters() if p.requires_grad], lr=1e-5, momentum=0.9)


def ours(preset, method, device):
    run, opt = setup(preset, method, device)
    loss_fn = loss_of(run, run.task)
    def step(t):
        opt.zero_grad(); loss_fn(t)[0].backward(); opt.step()
    return step, run.about['batch_size']


def plain(preset, method, device):
    run, opt = setup(preset, method, device)
    about, models, goal, _, task = run
    student, teacher, head = models
    eps, alpha, steps, batch = pixels(about['eps']), pixels(about['pgd_step']), about['pgd_steps'], about['batch_size']
    class Classifier(torch.nn.Module):
        def __init__(self): super().__init__(); self.clip = student
        def forward(self, x): return goal.scale * self.clip.cosines(x, head)
    classifier = Classifier().eval()
    attack = torchattacks.PGD(classifier, eps=eps, alpha=alpha, steps=steps, random_start=True)
    def soft_pgd(x, target):
        x_adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
        for _ in range(steps):
            x_adv.requires_grad = True
            grad, = torch.autograd.grad(F.cross_entropy(classifier(x_adv), target), x_adv)
            x_adv = (x + (x_adv.detach() + alpha*grad.sign() - x).clamp(-eps, eps)).clamp(0, 1).detach()
        return x_adv
    def step(t):
        at = batch_indices(len(task), batch, t)
        x, y = task.images[at].to(device) / 255, task.labels[at].to(device)
        if method == 'TeCoA': target, x_adv = y, attack(x, y)
        else:
            with torch.no_grad(): target = goal.target(models, Batch(x, y, teacher.encode_image(x)))
            x_adv = soft_pgd(x, target)
        opt.zero_grad(); F.cross_entropy(classifier(x_adv), target).backward(); opt.step()
    return step, batch


def peak_mib(side, preset, method, device):
    "Peak memory of three steps in a fresh process: allocated on a GPU, resident on a CPU."
    code = f'''import resource, sys, torch; sys.path.insert(0, {str(Path(__file__).parent)!r}); import train_step as b
step, _ = b.{side}({preset!r}, {method!r}, {device!r}); [step(t) for t in range(3)]
print(torch.cuda.max_memory_allocated()/2**20 if {device!r} != "cpu" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**10)'''
    return float(subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout.split()[-1])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--preset', default='tiny'); p.add_argument('--device', default='cpu'); p.add_argument('--rounds', type=int, default=7)
    p.add_argument('--out', default='results/benchmark_train_step.json')
    a = p.parse_args()
    began, found = time.time(), {}
    for method in ('TeCoA', 'AGFT'):
        sides, rates = {'agft': ours(a.preset, method, a.device), 'plain': plain(a.preset, method, a.device)}, {'agft': [], 'plain': []}
        for r in range(-1, a.rounds):                                      # round -1 warms up
            for name, (step, batch) in sorted(sides.items(), reverse=r % 2 == 0):
                t = time.perf_counter()
                for s in range(STEPS): step(STEPS*(r + 1) + s)
                if a.device != 'cpu': torch.cuda.synchronize()
                if r >= 0: rates[name].append(STEPS*batch / (time.perf_counter() - t))
        ratios = [o/p for o, p in zip(rates['agft'], rates['plain'])]
        peaks = {k: round(peak_mib(s, a.preset, method, a.device)) for k, s in (('agft', 'ours'), ('plain', 'plain'))}
        found[method] = dict(ratio=round(statistics.median(ratios), 3), ratio_range=[round(min(ratios), 3), round(max(ratios), 3)],
                             images_per_second={k: round(statistics.median(v), 1) for k, v in rates.items()},
                             peak_mib=peaks, peak_ratio=round(peaks['agft']/peaks['plain'], 3))
        print(method, json.dumps(found[method]), flush=True)
    found['about'] = dict(command=f'python benchmarks/train_step.py --preset {a.preset} --device {a.device} --rounds {a.rounds}', n=a.rounds,
                          machine=machine(a.device), seconds=round(time.time() - began, 1))
    write_json(a.out, found)


if __name__ == '__main__': main()
