"""Several processes, or several parts of a batch, train as one process does.

    pytest -m slow -s tests/test_processes.py

prints, for each method, by how much two processes and one differ: in the first gradient, and in the weights
after 20 steps.
"""
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import worker

import agft.evaluation as evaluation
from agft.cli import main
from agft.core import AgftError
from agft.evaluation import read_flags
from agft.loop import read_log
from agft.methods import METHODS
from agft.results import Results
from agft.weights import load_model, new_model, save_model

SPLIT = [name for name in METHODS if not METHODS[name].reads_captions]  # the others need the whole batch
MAPS = 'TGA-ZSR', 'TGA-ZSR-mean'                                        # need a vision transformer
ON_SMALL = [name for name in SPLIT if name not in MAPS]
WORKER = Path(worker.__file__)


def launched(count, *words, **more):
    "Run a program in processes that torchrun starts."
    launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={count}']
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.getcwd()} | more
    return subprocess.run([*map(str, [sys.executable, *launch, *words])], env=env, capture_output=True,
                          text=True, timeout=500)


def together(function, jobs, code=0, **more):
    "Call a function of worker.py in two processes, with the arguments of each job; what they print."
    done = launched(2, WORKER, function, json.dumps(jobs, default=str), **more)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + done.stderr


def alone(name, out, **changes): return worker.train(name, out, changes)


def largest_difference(a, b):
    return max((a[key] - b[key]).abs().max().item() for key in a)


def weights(out): return dict(load_model(out/'model.safetensors').visual.named_parameters())


def same_first_step(one, other):
    "The logs of two runs agree in their first step."
    first, second = read_log(one)[0], read_log(other)[0]
    for key in {*first} - {'seconds', 'zero_grad'}:
        assert second[key] == pytest.approx(first[key], rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize('name', ON_SMALL)
def test_a_batch_in_parts(tmp_path, name):
    "Gradients that are accumulated over ragged parts are those of the whole batch."
    whole = alone(name, tmp_path/'a')
    parts = alone(name, tmp_path/'b', **{'train.accumulate': 3})
    assert largest_difference(whole, parts) < 1e-5
    same_first_step(tmp_path/'a', tmp_path/'b')


def test_captions_are_compared_with_the_whole_batch(tmp_path):
    with pytest.raises(AgftError, match='AdvFLYP compares.*2 parts.*train.accumulate 1'):
        alone('AdvFLYP', tmp_path/'a', **{'train.accumulate': 2, 'method.lr': 1e-3})


def test_two_processes_are_one(tmp_path, interrupted):
    "From the start, and where one process was interrupted."
    one, whole = alone('PMG-AFT', tmp_path/'one'), alone('AGFT', tmp_path/'whole')
    interrupted(3, lambda: alone('AGFT', tmp_path/'cut'))
    told = together('train', [['PMG-AFT', tmp_path/'two', {}], ['AGFT', tmp_path/'cut', {}]])
    assert 'Traceback' not in told
    assert largest_difference(one, weights(tmp_path/'two')) < 1e-5
    assert largest_difference(whole, weights(tmp_path/'cut')) < 1e-5
    same_first_step(tmp_path/'one', tmp_path/'two')
    for out in (tmp_path/'two', tmp_path/'cut'):
        assert [line['step'] for line in read_log(out)] == [0, 1, 2]
        assert len((out/'log.jsonl').read_text().splitlines()) == 3, 'more than one process wrote'
        assert sorted(f.name for f in out.iterdir()) == ['.lock', 'log.jsonl', 'model.safetensors',
                                                         'run.json', 'state.pt']


VIT = dict(embed_dim=32, vision_cfg=dict(image_size=32, patch_size=8, width=64, layers=2),
           text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1))


@pytest.fixture
def smooth(tmp_path, architectures, monkeypatch):
    """For each method, a run of a vision transformer of random weights in which rounding stays rounding.

    An attack step is a sign. Where a ReLU changes its side, many signs change with it; GELU is smooth. Where
    predictions are saturated, as at the logit scale of TRADES-AGFT, the attack follows differences that are
    as small as rounding; at 14.3, the model's own scale, it does not. Soft has γ = 0.7: at γ = 1 the student
    starts at its target, and the gradient of its attack is as small as rounding. PMG-AFT trains at logit
    scale 1 and needs a higher rate to move.
    """
    architectures({'agft-vit': VIT})
    monkeypatch.setenv('ARCHITECTURES', str(tmp_path/'configs'))  # for the processes that are launched
    torch.manual_seed(0)
    save_model(new_model('agft-vit'), tmp_path/'vit.safetensors')
    same = {'model.name': str(tmp_path/'vit.safetensors'), 'method.lr': 3e-4, 'train.grad_clip': None}
    own = {'TRADES-AGFT': {'method.logit_scale': 14.3}, 'PMG-AFT': {'method.lr': 3e-3},
           'Soft': {'method.gamma': .7}}
    return {name: same | own.get(name, {}) for name in SPLIT}


@pytest.mark.slow
def test_the_first_gradient_of_every_method(tmp_path, smooth):
    """Two processes and one differ in no component by more than a millionth of the gradient's length.

    In a few batches of a hundred, the gradient at some pixel is as small as rounding, and the attack step at
    it has another sign. So two of three batches must agree.
    """
    for name in MAPS:  # the student is the teacher, and rounding decides where their distance grows
        smooth[name]['method.beta'] = 0.
    for name in SPLIT:
        worker.first_gradients(name, tmp_path/f'{name}-one', smooth[name])
    together('first_gradients', [[name, tmp_path/f'{name}-two', smooth[name]] for name in SPLIT])
    for name in SPLIT:
        one, *two = [torch.load(tmp_path/f'{name}-{which}.pt') for which in ('one-0', 'two-0', 'two-1')]
        apart = (one - two[0]).abs().amax(1)/one.norm(dim=1)
        print(f'{name}: gradients differ by {", ".join(f"{share:.1e}" for share in apart)} of their length')
        assert apart.median() < 1e-6, name
        assert torch.equal(*two), 'the processes do not share their gradient'


@pytest.mark.slow
def test_twenty_steps_of_every_method(tmp_path, smooth, interrupted):
    start, one = dict(load_model(smooth['AGFT']['model.name']).visual.named_parameters()), {}
    jobs = []
    for name in SPLIT:
        changes = smooth[name] | {'train.steps': 20, 'train.checkpoint_every': 1}
        one[name] = alone(name, tmp_path/f'{name}-one', **changes)
        jobs.append((name, tmp_path/f'{name}-two', changes))
    for job in [job for job in jobs if job[0] in MAPS]:  # one process takes the first step, as above
        interrupted(2, lambda job=job: worker.train(*job), METHODS['TGA-ZSR'])
    together('train', jobs)
    for name, out, _ in jobs:
        moved, apart = [largest_difference(one[name], other) for other in (start, weights(out))]
        print(f'{name}: 20 steps move weights by {moved:.1e}; two processes and one differ by {apart:.1e}')
        assert apart < 1e-5 < 1e-3 < moved, name


ORDER = """
import hashlib, os, signal
from pathlib import Path
from agft.core import launched
from agft.methods import Clean, register_method

@register_method('Order')
class Order(Clean):
    "Writes down the images of each step; after step `stop`, the second process is sent a signal."
    folder:str = ''
    stop:int = 0
    def loss(self, models, batch, x_adv, target):
        loss = super().loss(models, batch, x_adv, target)
        rank, count = launched()
        file = Path(self.folder)/f'{count}-{rank}.txt'
        with open(file, 'a') as lines:
            print(*[hashlib.sha256(x.numpy().tobytes()).hexdigest()[:8] for x in batch.x], file=lines)
        if rank == 1 and len(file.read_text().splitlines()) == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss
"""


def images_of(folder, count):
    "The images of each step, first those of the first of `count` processes."
    lines = [(folder/f'{count}-{rank}.txt').read_text().splitlines() for rank in range(count)]
    return [' '.join(parts).split() for parts in zip(*lines, strict=True)]


@pytest.mark.slow
def test_the_order_of_the_images_does_not_depend_on_the_processes(tmp_path, interrupted):
    (tmp_path/'order.py').write_text(ORDER)
    def job(name, **options):
        (tmp_path/f'images-{name}').mkdir()
        options['folder'] = str(tmp_path/f'images-{name}')
        return 'Order', str(tmp_path/name), {'plugins': [str(tmp_path/'order.py')], 'method.lr': 1e-3,
                                             'method.options': options, 'train.steps': 20}
    whole, two, grows, shrinks = job('whole'), job('two'), job('grows'), job('shrinks', stop=9)
    worker.train(*whole)
    interrupted(8, lambda: worker.train(*grows))
    told = together('train', [two, grows, shrinks], 1)
    assert 'exitcode  : 143' in told and 'continues at step 6' in told
    worker.train(*shrinks)
    seen = images_of(tmp_path/'images-whole', 1)
    assert [len(step) for step in seen] == [7]*20
    counts = Counter(image for step in seen for image in step)
    assert [*counts.values()] == [7]*20, '20 steps of 7 images are 7 epochs of 20 images'
    assert images_of(tmp_path/'images-two', 2) == seen
    assert images_of(tmp_path/'images-grows', 1) == seen[:7]
    assert images_of(tmp_path/'images-grows', 2) == seen[6:]
    assert images_of(tmp_path/'images-shrinks', 2) == seen[:9]
    assert images_of(tmp_path/'images-shrinks', 1) == seen[9:]


def test_more_parts_than_images_are_refused(tmp_path):
    with pytest.raises(AgftError, match='train.batch_size is 7; allowed: 8 '):
        alone('AGFT', tmp_path, **{'train.accumulate': 8})


RAGGED = 1, 3, 7, 10  # images, in batches of three: also fewer batches than processes


def test_a_ragged_task_is_counted_exactly(tmp_path):
    together('evaluate', [[n, tmp_path/f'two{n}'] for n in RAGGED])
    for n in RAGGED:
        worker.evaluate(n, tmp_path/f'one{n}')
        shares = [int((tmp_path/f'two{n}-{rank}.txt').read_text()) for rank in (0, 1)]
        assert sum(shares) == n and (min(shares) > 0) == (n > 3), 'each image is measured once'
        assert len(read_flags(tmp_path/f'two{n}'/'digits.npz').clean) == n
        one, two = [(tmp_path/f'{count}{n}'/'digits.npz').read_bytes() for count in ('one', 'two')]
        assert one == two
        assert [f.name for f in (tmp_path/f'two{n}').iterdir()] == ['digits.npz']


WORDS = ['--tasks', 'digits,texture', '--attacks', 'pgd20', '--eval.images', '10', '--eval.batch-size', '3']


def evaluated(out, count): return launched(count, '-m', 'agft', 'eval', 'agft-tiny', *WORDS, '--out', out)


def flags_of(out): return {f.relative_to(out): f.read_bytes() for f in (out/'flags').rglob('*.npz')}


def test_an_evaluation_is_shared_out_and_continued_by_another_number_of_processes(tmp_path):
    whole, cut = tmp_path/'whole', tmp_path/'cut'
    done = evaluated(whole, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('zero-shot mean') == 1, 'more than one process printed'
    files, batch = [], evaluation._evaluate_batch
    def dies(*args):
        files.append(1)
        if len(files) > 2:
            raise KeyboardInterrupt
        return batch(*args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, '_evaluate_batch', dies)
        assert main(['eval', 'agft-tiny', *WORDS, '--out', str(cut)]) == 130
    assert evaluated(cut, 2).returncode == 0
    assert main(['eval', 'agft-tiny', *WORDS, '--out', str(tmp_path/'one')]) == 0
    assert flags_of(whole) == flags_of(cut) == flags_of(tmp_path/'one') and len(flags_of(whole)) == 2
    rows = [Results.load(out/'results.json').accuracy.to_dict() for out in (whole, cut, tmp_path/'one')]
    assert rows[0] == rows[1] == rows[2]
    assert 'refused' not in done.stderr


def test_other_commands_refuse_several_processes(monkeypatch, capsys):
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert main(['audit', 'agft-tiny']) == 2
    assert 'agft audit runs in one process' in capsys.readouterr().err
