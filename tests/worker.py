"""What tests do in processes that torchrun starts: worker.py FUNCTION JOBS.

FUNCTION is one of this file, JOBS a JSON list with the arguments of each call. The tests call the same
functions for what one process does.
"""
import json
import os
import sys
from pathlib import Path

import torch

import agft.evaluation as evaluation
from agft.config import load_preset, override
from agft.core import launched
from agft.data import load_task
from agft.threats import threat
from agft.train import finetune, prepare_run
from agft.weights import load_model

# an attack step is a sign, so rounding grows with the update: gradients are clipped, and no rate is high
SMALL = {'method.lr': .005, 'train.images': 20, 'train.batch_size': 7, 'train.steps': 3,
         'train.checkpoint_every': 2, 'train.grad_clip': 1., 'train.warmup': 0.}


def forbid_writing(folder):
    "From now on, this process fails when it opens or moves a file of `folder` to write it."
    share = f'.teacher.pt.{launched()[0]}.'  # its features, which the first process joins with the others
    def watch(event, args):
        opened = event == 'open' and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        inside = str(args[0]).startswith(str(folder)) if opened or event == 'os.rename' else False
        if inside and not Path(args[0]).name.startswith(share):
            raise RuntimeError(f'process {launched()[0]} writes {args[0]}')
    sys.addaudithook(watch)


def setup(name, changes):
    "A configuration, and the device for it."
    config = override(load_preset('tiny').finetune(name), **(SMALL | changes))
    return config, 'auto' if launched()[1] > 1 else 'cpu'


def train(name, out, changes):
    "Fine-tune; the weights of the image encoder."
    if launched()[0] > 0:
        forbid_writing(out)
    config, device = setup(name, changes)
    return dict(finetune(config, out, device).visual.named_parameters())


def first_gradients(name, out, changes):
    "Write the gradients of the first three batches, each at the initial weights, to a file of this process."
    run, found = prepare_run(*setup(name, changes)), []
    loss_fn, params = run.loss_fn(), [p for p in run.models.student.parameters() if p.requires_grad]
    for number in range(3):
        loss, _ = loss_fn(number)
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in params if p.grad is not None]))
        for p in params:
            p.grad = None
    torch.save(torch.stack(found), f'{out}-{launched()[0]}.pt')


def evaluate(images, out):
    "Evaluate in batches of three, and write how many images this process has measured."
    measured, batch = [], evaluation._evaluate_batch
    def counted(logits_fn, x, *more):
        measured.append(len(x))
        return batch(logits_fn, x, *more)
    evaluation._evaluate_batch = counted
    try:
        task = load_task('digits', images)
        evaluation.evaluate_tasks(load_model('agft-tiny'), [task], out, threat('fgsm', 4/255), batch_size=3)
    finally:
        evaluation._evaluate_batch = batch
    Path(f'{out}-{launched()[0]}.txt').write_text(str(sum(measured)))


if __name__ == '__main__':
    _, function, jobs = sys.argv
    import open_clip
    if os.environ.get('ARCHITECTURES'):
        open_clip.add_model_config(os.environ['ARCHITECTURES'])
    for job in json.loads(jobs):
        globals()[function](*job)
