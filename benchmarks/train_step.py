"""One adversarial training step: agft against the same step written plainly, side by side in one run.

    python benchmarks/train_step.py [--preset tiny] [--device cpu] [--precision fp32] [--rounds 7]
                                    [--architecture ViT-B-32 --batch 256] [--no-curves]
                                    [--out results/benchmark_train_step.json]

The plain step is what public code does: torchattacks' PGD on the batch's mean loss for TeCoA; for AGFT,
whose target torchattacks cannot take, the same loop with a soft target, and the frozen teacher run on every
batch; in fp16, autocast with a scaled loss, without compilation. Each side works in a process of its own,
set up as its users have it (`agft train` keeps freed memory), and the two take turns: a round is three
steps of one side and three of the other, while the first waits. The ratio of the rates is the median over
rounds. Peak memory is that of the process, or what was allocated on a GPU.

The row `PGD-20` compares the attack of 20 steps on a batch, without early stopping on either side. With
`--architecture` the model has random weights and the images are noise at its resolution: speed does not
depend on what they are.

The table `curves` repeats the comparison for AGFT with one setting changed: batch, number of prompts,
resolution, steps of the attack. The table `kernels` says where agft's step spends its time: the share of
matrix products and convolutions, and their rate beside that of one large matrix product.
"""
import argparse
import json
import multiprocessing
import resource
import statistics
import time

import torch
import torch.nn.functional as F
import torchattacks
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from agft.attack import pgd
from agft.config import load_preset, override
from agft.core import keep_freed_memory, seeded
from agft.data import Task, batch_indices
from agft.loop import Stepper
from agft.methods import Batch
from agft.report import machine
from agft.results import Results, table
from agft.train import prepare_run
from agft.weights import load_model, new_model

STEPS = 3 # optimizer steps in a round
METHODS = 'TeCoA', 'AGFT'
CURVES = dict(batch=(16, 32, 64, 128), prompts=(10, 100, 1000), pixels=(32, 64, 128), steps=(1, 2, 5, 10))


def noise_task(n, side, prompts):
    "Random images of random classes; speed does not depend on what they are."
    images = torch.randint(256, (n, 3, side, side), dtype=torch.uint8)
    names = tuple(f'thing number {i}' for i in range(prompts))
    return Task('noise', images, torch.arange(n) % prompts, names, ('a picture of {}',))


def setup(a, method, batch=None, prompts=None, pixels=None, steps=None):
    "A run on four batches of images, with settings that differ from the preset's."
    recipe = load_preset(a.preset)
    batch = batch or a.batch or recipe.train.batch_size
    config = override(recipe.finetune(method), **{
        'train.images': 4*batch, 'train.batch_size': batch, 'train.precision': a.precision,
        'attack.steps': recipe.attack.steps if steps is None else steps})
    if not (prompts or pixels or a.architecture):
        return prepare_run(config, a.device)
    model = new_model(a.architecture) if a.architecture else load_model(config.model.name)
    task = noise_task(4*batch, pixels or model.size[0], prompts or 100)
    return prepare_run(config, a.device, model, task)


def first_batch(run, device):
    "Pixels and labels."
    size = run.config.train.batch_size
    return run.task.images[:size].to(device)/255, run.task.require_labels()[:size].to(device)


def ours(a, method, **changes):
    "agft's step, and the images in it."
    keep_freed_memory()
    run = setup(a, 'TeCoA' if method == 'PGD-20' else method, **changes)
    train, eps = run.config.train, run.config.attack.eps
    if method == 'PGD-20':
        student, _, head = run.models
        x, y = first_batch(run, a.device)
        def attack(t):
            start = seeded('pgd20', t, device=x.device)
            pgd(lambda x: student.logits(x, head), x, y, eps, eps/4, 20, start)
        return attack, train.batch_size
    stepper = Stepper(run.models.student, train, 1e-5, train.accumulate, train.precision == 'fp16')
    loss_fn = run.loss_fn()
    return lambda t: stepper(t, loss_fn), train.batch_size


class Classifier(torch.nn.Module):
    "Scaled cosines as the module that torchattacks asks for."
    def __init__(self, clip, head, logit_scale, half):
        super().__init__()
        self.clip, self.head, self.logit_scale, self.autocast = clip, head, logit_scale, half
    def forward(self, x):
        with torch.autocast(self.head.device.type, torch.float16, enabled=self.autocast):
            return self.logit_scale * self.clip.cosines(x, self.head)


def soft_pgd(classifier, x, target, attack):
    "PGD on the mean cross-entropy with a soft target."
    x_adv = (x + torch.empty_like(x).uniform_(-attack.eps, attack.eps)).clamp(0, 1)
    for _ in range(attack.steps):
        x_adv.requires_grad = True
        grad, = torch.autograd.grad(F.cross_entropy(classifier(x_adv), target), x_adv)
        delta = (x_adv.detach() + attack.step*grad.sign() - x).clamp(-attack.eps, attack.eps)
        x_adv = (x + delta).clamp(0, 1).detach()
    return x_adv


def plain(a, method, **changes):
    "The same step without agft, and the images in it."
    run = setup(a, 'TeCoA' if method == 'PGD-20' else method, **changes)
    half = a.precision == 'fp16'
    attack, train = run.config.attack, run.config.train
    student, teacher, head = run.models
    student.precision = teacher.precision = 'fp32'  # autocast, and nothing of agft's
    params = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=1e-5, momentum=0.9)
    scaler = torch.amp.GradScaler(a.device, enabled=half)
    classifier = Classifier(student, head, run.method.logit_scale, half).eval()
    if method == 'PGD-20':
        pgd20, (x, y) = torchattacks.PGD(classifier, attack.eps, attack.eps/4, 20), first_batch(run, a.device)
        return lambda t: pgd20(x, y), train.batch_size
    label_pgd = torchattacks.PGD(classifier, attack.eps, attack.step, attack.steps, random_start=True)
    labels = run.task.require_labels()
    def step(t):
        indices = batch_indices(len(run.task), train.batch_size, t)
        x, y = run.task.images[indices].to(a.device)/255, labels[indices].to(a.device)
        if method == 'TeCoA':
            target, x_adv = y, label_pgd(x, y)
        else:
            with torch.no_grad(), torch.autocast(a.device, torch.float16, enabled=half):
                known = teacher.encode_image(x)
            target = run.method.target(run.models, Batch(x, y, known.float()))
            x_adv = soft_pgd(classifier, x, target, attack)
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(x_adv).float(), target)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if train.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(params, train.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        loss.item()  # its log
    return step, train.batch_size


SIDES = {'agft': ours, 'plain': plain}


def serve(pipe, side, a, method, changes):
    "In a process of its own: make the step, then take steps when asked, and answer with seconds."
    torch.set_num_threads(a.threads)
    step, batch_size = SIDES[side](a, method, **changes)
    pipe.send(batch_size)
    for t in iter(pipe.recv, None):
        began = time.perf_counter()
        for s in range(STEPS):
            step(STEPS*t + s)
        if a.device != 'cpu':
            torch.cuda.synchronize()
        pipe.send(time.perf_counter() - began)
    on_cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**10
    pipe.send(on_cpu if a.device == 'cpu' else torch.cuda.max_memory_allocated()/2**20)


def compare(a, method, rounds, **changes):
    "The rates of both sides, images a second, one a round, and their peak memory, MiB."
    context, pipes, workers = multiprocessing.get_context('spawn'), {}, []
    for side in SIDES:
        pipes[side], theirs = context.Pipe()
        workers.append(context.Process(target=serve, args=(theirs, side, a, method, changes), daemon=True))
        workers[-1].start()
        theirs.close()  # so that the end of the process is seen
    sizes = {side: pipe.recv() for side, pipe in pipes.items()}
    rates = {side: [] for side in SIDES}
    for r in range(rounds + 1):  # round 0 warms up
        for side, pipe in sorted(pipes.items(), reverse=r % 2 == 0):
            pipe.send(r)
            seconds = pipe.recv()
            if r:
                rates[side].append(STEPS*sizes[side]/seconds)
    for pipe in pipes.values():
        pipe.send(None)
    peaks = {side: pipe.recv() for side, pipe in pipes.items()}
    for worker in workers:
        worker.join()
    return rates, peaks


def row(rates, peaks, **names):
    "What the table holds of one comparison."
    ratios = [own/other for own, other in zip(rates['agft'], rates['plain'], strict=True)]
    numbers = dict(names, ratio=round(statistics.median(ratios), 3), low=round(min(ratios), 3),
                   high=round(max(ratios), 3))
    for side in SIDES:
        numbers[f'images_per_second_{side}'] = round(statistics.median(rates[side]), 1)
    for side in SIDES:
        numbers[f'peak_mib_{side}'] = round(peaks[side])
    print(json.dumps(numbers), flush=True)
    return numbers


_COMPUTE = ('conv', 'mm', 'linear', 'gemm', 'attention', 'cudnn', 'cutlass', 'wgrad', 'dgrad', 'nvjet',
            'flash', 'fmha', 'xmma', 'cublas')


def kernels(a, method):
    "Where the time of agft's step goes."
    torch.set_num_threads(a.threads)
    step, _ = ours(a, method)
    step(0)
    with FlopCounterMode(display=False) as counter:
        step(1)
    flops, sync = counter.get_total_flops(), torch.cuda.synchronize if a.device != 'cpu' else lambda: None
    sync()
    began = time.perf_counter()
    for t in range(2, 2 + STEPS):
        step(t)
    sync()
    seconds = (time.perf_counter() - began)/STEPS
    activity = ProfilerActivity.CPU if a.device == 'cpu' else ProfilerActivity.CUDA
    with profile(activities=[activity]) as found:
        step(2 + STEPS)
        sync()
    times = {}
    for event in found.key_averages():
        own = event.self_cpu_time_total if a.device == 'cpu' else event.self_device_time_total
        times[event.key] = times.get(event.key, 0.) + own
    compute = sum(own for name, own in times.items() if any(word in name.lower() for word in _COMPUTE))
    peak = matmul_rate(a, sync)
    numbers = dict(method=method, share_of_compute_kernels=round(compute/sum(times.values()), 3),
                   gflop_a_step=round(flops/1e9, 1), gflop_a_second=round(flops/seconds/1e9, 1),
                   gflop_a_second_of_matmul=round(peak/1e9, 1), utilisation=round(flops/seconds/peak, 3))
    print(json.dumps(numbers), flush=True)
    return numbers


def matmul_rate(a, sync, size=None):
    "Floating-point operations a second in one large matrix product of the precision."
    size = size or (2048 if a.device == 'cpu' else 8192)
    dtype = dict(fp16=torch.float16, bf16=torch.bfloat16).get(a.precision, torch.float32)
    x = torch.randn(size, size, device=a.device).to(dtype)
    rates = []
    for _ in range(8):
        sync()
        began = time.perf_counter()
        torch.mm(x, x)
        sync()
        rates.append(2*size**3/(time.perf_counter() - began))
    return statistics.median(rates[3:])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--preset', default='tiny')
    p.add_argument('--device', default='cpu')
    p.add_argument('--precision', default='fp32')
    p.add_argument('--rounds', type=int, default=7)
    p.add_argument('--threads', type=int, default=torch.get_num_threads())
    p.add_argument('--architecture', help='of open_clip, with random weights')
    p.add_argument('--batch', type=int, help="images a step (default: the preset's)")
    p.add_argument('--no-curves', action='store_true')
    p.add_argument('--out', default='results/benchmark_train_step.json')
    a = p.parse_args()
    began = time.time()
    rows = [row(*compare(a, method, a.rounds), method=method) for method in (*METHODS, 'PGD-20')]
    curves = []
    for setting, values in CURVES.items() if not a.no_curves else ():
        for value in values:
            found = compare(a, 'AGFT', max(2, a.rounds//3), **{setting: value})
            curves.append(row(*found, setting=setting, value=value))
    where = [kernels(a, method) for method in METHODS]
    options = f'--preset {a.preset} --device {a.device} --precision {a.precision} --rounds {a.rounds}'
    options += f' --architecture {a.architecture}' if a.architecture else ''
    options += f' --batch {a.batch}' if a.batch else ''
    options += ' --no-curves' if a.no_curves else ''
    about = dict(command=f'python benchmarks/train_step.py {options}', n=a.rounds, threads=a.threads,
                 machine=machine(a.device), seconds=round(time.time() - began, 1))
    tables = dict(train_step=table(rows), curves=table(curves), kernels=table(where))
    Results.from_records([], about=about, tables=tables).save(a.out)


if __name__ == '__main__':
    main()
