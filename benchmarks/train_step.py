"""One adversarial training step: agft against the same step written plainly, side by side in one run.

    python benchmarks/train_step.py [--model agft-tiny] [--device cpu] [--rounds 7] [--out results/benchmark_train_step.json]

The plain step is what public code does: torchattacks' PGD on the batch's mean loss for TeCoA; for AGFT, whose target
torchattacks cannot take, the same loop with a soft target and the frozen teacher run on every batch.
Rounds alternate between the two; the ratio is the median over rounds. Peak memory (on a CPU: of the whole process) is measured in a process of its own each.
"""
import argparse, json, statistics, subprocess, sys, time
from pathlib import Path
import torch, torch.nn.functional as F, torchattacks
from agft.attack import pixels
from agft.clip import load_clip
from agft.core import load_preset, write_json
from agft.data import batch_indices, load_task
from agft.methods import Batch, Models, method as method_of
from agft.report import machine
from agft.train import adversarial_loss, settings_of

STEPS = 3   # optimizer steps in a round


def setup(model, method, device):
    preset = load_preset(model.removeprefix('agft-'))
    cfg = preset['train']
    task = load_task(preset['source'], 4*cfg['batch_size'], split='train')
    teacher, student = load_clip(model).to(device), load_clip(model).to(device)
    student.model.visual.requires_grad_(True)
    opt = torch.optim.SGD(student.model.visual.parameters(), lr=1e-5, momentum=0.9)
    return cfg, method_of(method, **settings_of(preset, method, teacher)), task, Models(student, teacher, teacher.head(task.classes, task.templates)), opt


def ours(model, method, device):
    cfg, goal, task, models, opt = setup(model, method, device)
    loss_fn = adversarial_loss(models, goal, task, pixels(cfg['eps']), pixels(cfg['pgd_step']), cfg['pgd_steps'], cfg['batch_size'])
    def step(t):
        opt.zero_grad(); loss_fn(t)[0].backward(); opt.step()
    return step, cfg['batch_size']


def plain(model, method, device):
    cfg, goal, task, models, opt = setup(model, method, device)
    student, teacher, head = models
    eps, alpha, steps = pixels(cfg['eps']), pixels(cfg['pgd_step']), cfg['pgd_steps']
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
        at = batch_indices(len(task), cfg['batch_size'], t)
        x, y = task.images[at].to(device) / 255, task.labels[at].to(device)
        if method == 'TeCoA': target, x_adv = y, attack(x, y)
        else:
            with torch.no_grad(): target = goal.target(models, Batch(x, y, teacher.encode_image(x)))
            x_adv = soft_pgd(x, target)
        opt.zero_grad(); F.cross_entropy(classifier(x_adv), target).backward(); opt.step()
    return step, cfg['batch_size']


def peak_mib(side, model, method, device):
    "Peak memory of three steps in a fresh process: allocated on a GPU, resident on a CPU."
    code = f'''import resource, sys, torch; sys.path.insert(0, {str(Path(__file__).parent)!r}); import train_step as b
step, _ = b.{side}({model!r}, {method!r}, {device!r}); [step(t) for t in range(3)]
print(torch.cuda.max_memory_allocated()/2**20 if {device!r} != "cpu" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**10)'''
    return float(subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout.split()[-1])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='agft-tiny'); p.add_argument('--device', default='cpu'); p.add_argument('--rounds', type=int, default=7)
    p.add_argument('--out', default='results/benchmark_train_step.json')
    a = p.parse_args()
    began, found = time.time(), {}
    for method in ('TeCoA', 'AGFT'):
        sides, rates = {'agft': ours(a.model, method, a.device), 'plain': plain(a.model, method, a.device)}, {'agft': [], 'plain': []}
        for r in range(-1, a.rounds):                                      # round -1 warms up
            for name, (step, batch) in sorted(sides.items(), reverse=r % 2 == 0):
                t = time.perf_counter()
                for s in range(STEPS): step(STEPS*(r + 1) + s)
                if a.device != 'cpu': torch.cuda.synchronize()
                if r >= 0: rates[name].append(STEPS*batch / (time.perf_counter() - t))
        ratios = [o/p for o, p in zip(rates['agft'], rates['plain'])]
        peaks = {k: round(peak_mib(s, a.model, method, a.device)) for k, s in (('agft', 'ours'), ('plain', 'plain'))}
        found[method] = dict(ratio=round(statistics.median(ratios), 3), ratio_range=[round(min(ratios), 3), round(max(ratios), 3)],
                             images_per_second={k: round(statistics.median(v), 1) for k, v in rates.items()},
                             peak_mib=peaks, peak_ratio=round(peaks['agft']/peaks['plain'], 3))
        print(method, json.dumps(found[method]), flush=True)
    found['about'] = dict(command=f'python benchmarks/train_step.py --model {a.model} --device {a.device} --rounds {a.rounds}', n=a.rounds,
                          machine=machine(a.device), seconds=round(time.time() - began, 1))
    write_json(a.out, found)


if __name__ == '__main__': main()
