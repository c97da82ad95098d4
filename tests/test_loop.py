"Checkpoints that are kept, validation, and whoever watches a run."
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import agft
import agft.loop as loop
from agft.config import OptimConfig, load_preset, override
from agft.core import AgftError
from agft.data import load_task
from agft.evaluation import evaluate_task
from agft.loop import Validation, fit, load_tensors, read_log
from agft.model import fingerprint
from agft.plots import LiveCurves
from agft.threats import threat
from agft.train import finetune
from agft.weights import checkpoint_info, load_model

TINY = load_preset('tiny')
SMALL = {'train.images': 16, 'train.batch_size': 8, 'train.steps': 4, 'train.warmup': 0., 'method.lr': 1e-3,
         'train.checkpoint_every': 2}


def line():
    "A module with one weight, and the loss that pulls it to zero."
    net = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(1.)
    return net, lambda step: (net.weight.square().sum(), {})


def files(out): return sorted(path.name for path in out.glob('state*'))


# -- checkpoints

def test_the_last_checkpoints_are_kept(tmp_path):
    optim = OptimConfig(steps=10, checkpoint_every=2, keep_checkpoints=3)
    whole, loss_fn = line()
    fit(whole, loss_fn, tmp_path, optim, .1)
    assert files(tmp_path) == ['state-00000006.pt', 'state-00000008.pt', 'state.pt']
    assert [load_tensors(tmp_path/name)['step'] for name in files(tmp_path)] == [6, 8, 10]
    (tmp_path/'state-00000006.pt').replace(tmp_path/'state.pt')
    again, loss_fn = line()
    fit(again, loss_fn, tmp_path, optim, .1)
    assert again.weight.item() == whole.weight.item()
    assert [entry['step'] for entry in read_log(tmp_path)] == [*range(10)]


def test_a_smaller_number_of_checkpoints_removes_the_others(tmp_path):
    fit(*line(), tmp_path, OptimConfig(steps=6, checkpoint_every=2, keep_checkpoints=3), .1)
    fit(*line(), tmp_path, OptimConfig(steps=8, checkpoint_every=2), .1)
    assert files(tmp_path) == ['state.pt']


def test_how_many_are_kept_does_not_define_the_run(tmp_path):
    config = override(TINY.finetune('TeCoA'), **SMALL)
    first = finetune(override(config, **{'train.steps': 4}), tmp_path, 'cpu')
    kept = finetune(override(config, **{'train.keep_checkpoints': 2}), tmp_path, 'cpu')  # reads the result
    assert fingerprint(first) == fingerprint(kept)


# -- validation

def measured(values):
    "A validation that returns these numbers, and what was saved as the best."
    numbers, saved = iter(values), []
    measure = lambda: dict(clean=next(numbers), robust=0.)  # noqa: E731
    return Validation(2, measure, lambda steps, found: saved.append((steps, found['clean']))), saved


def test_the_best_weights_are_those_of_the_highest_score(tmp_path):
    validation, saved = measured([.3, .6, .5, .6])
    fit(*line(), tmp_path, OptimConfig(steps=7), .1, validation=validation)
    assert saved == [(2, .3), (4, .6)]
    clean = [entry.get('validation_clean') for entry in read_log(tmp_path)]
    assert clean == [None, .3, None, .6, None, .5, .6]  # after 2, 4, 6 and all 7 steps


def test_the_best_score_survives_an_interruption(tmp_path):
    optim = OptimConfig(steps=8, checkpoint_every=4)
    validation, saved = measured([.9, .1])
    net, loss_fn = line()
    def stops(step):
        if step == 5:
            raise KeyboardInterrupt
        return loss_fn(step)
    with pytest.raises(KeyboardInterrupt):
        fit(net, stops, tmp_path, optim, .1, validation=validation)
    validation, again = measured([.5, .6])
    fit(*line(), tmp_path, optim, .1, validation=validation)
    assert saved == [(2, .9)] and again == []


@pytest.fixture(scope='module')
def validated(tmp_path_factory):
    "A run with validation, and its folder."
    out = tmp_path_factory.mktemp('validated')
    validating = {'train.validate_every': 2, 'train.validate_images': 10}
    config = override(TINY.finetune('TeCoA'), **SMALL, **validating)
    return config, finetune(config, out/'run', 'cpu'), out/'run'


def test_validation_is_the_accuracy_on_the_validation_images(validated):
    config, student, out = validated
    task = load_task('source', n=10, split='val')
    flags = evaluate_task(student, task, threat('pgd20', config.attack.eps))
    last = read_log(out)[-1]
    assert last['validation_clean'] == flags.clean.mean()
    assert abs(last['validation_robust'] - flags.robust.mean()) <= .1  # another random start


def test_the_best_weights_are_a_checkpoint(validated):
    _, _, out = validated
    entries = [entry for entry in read_log(out) if 'validation_clean' in entry]
    scores = [entry['validation_clean'] + entry['validation_robust'] for entry in entries]
    best = entries[scores.index(max(scores))]
    notes = checkpoint_info(out/'best.safetensors')['best']
    assert notes['steps'] == best['step'] + 1
    assert (notes['clean'], notes['robust']) == (best['validation_clean'], best['validation_robust'])
    model = load_model(out/'best.safetensors')
    same = fingerprint(model) == fingerprint(load_model(out/'model.safetensors'))
    assert same == (notes['steps'] == 4)


def test_an_interrupted_run_has_the_same_best_weights(validated, tmp_path, interrupted):
    config, student, out = validated
    interrupted(4, lambda: finetune(config, tmp_path/'cut', 'cpu'))
    again = finetune(config, tmp_path/'cut', 'cpu')
    assert fingerprint(again) == fingerprint(student)
    cut, whole = tmp_path/'cut'/'best.safetensors', out/'best.safetensors'
    assert checkpoint_info(cut) == checkpoint_info(whole)
    assert fingerprint(load_model(cut)) == fingerprint(load_model(whole))
    def numbers(folder): return [{**entry, 'seconds': 0} for entry in read_log(folder)]
    assert numbers(tmp_path/'cut') == numbers(out)


def test_validation_of_a_given_task_is_refused(tmp_path):
    config = override(TINY.finetune('TeCoA'), **SMALL, **{'train.validate_every': 2})
    with pytest.raises(AgftError, match='train.validate_every needs a validation split, and texture'):
        finetune(config, tmp_path, 'cpu', task=load_task('texture', n=16, split='train'))


# -- watching

def test_everyone_who_watches_gets_every_line(tmp_path):
    seen = []
    fit(*line(), tmp_path, OptimConfig(steps=3), .1, watch=[lambda entry, steps: seen.append((entry, steps))])
    assert [entry for entry, _ in seen] == read_log(tmp_path) and {steps for _, steps in seen} == {3}


def test_the_public_function_passes_those_who_watch_on(tmp_path):
    seen = []
    changes = {key: value for key, value in SMALL.items() if key != 'train.images'}
    agft.finetune('agft-tiny', 'TeCoA', tmp_path, task=load_task('texture', n=8, split='train'),
                  watch=[lambda entry, steps: seen.append(entry)], **changes)
    assert seen == read_log(tmp_path)


def test_tensorboard_has_the_log(tmp_path, interrupted):
    reading = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    config = override(TINY.finetune('TeCoA'), **SMALL, **{'train.trackers': ['tensorboard']})
    interrupted(4, lambda: finetune(config, tmp_path/'run', 'cpu'))
    finetune(config, tmp_path/'run', 'cpu')
    events = reading.EventAccumulator(str(tmp_path/'run'/'agft'))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars('loss')]
    log = read_log(tmp_path/'run')
    assert [step for step, _ in found] == [0, 1, 2, 3]  # the repeated step counts once
    assert [value for _, value in found] == pytest.approx([entry['loss'] for entry in log])


def test_wandb_has_the_log(tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_DIR', str(tmp_path))
    sent, log = [], wandb.Run.log
    def spy(self, data, *rest, **more):
        sent.append(data['loss'])
        return log(self, data, *rest, **more)
    monkeypatch.setattr(wandb.Run, 'log', spy)
    config = override(TINY.finetune('TeCoA'), **SMALL, **{'train.trackers': ['wandb']})
    finetune(config, tmp_path/'run', 'cpu')
    assert sent == [entry['loss'] for entry in read_log(tmp_path/'run')]


@pytest.mark.parametrize(('name', 'message'), [
    ('mlflow', 'unknown tracker .mlflow.'), ('wandb', 'tracker wandb is not installed; pip install wandb')])
def test_a_tracker_that_is_absent_is_refused_first(tmp_path, monkeypatch, name, message):
    monkeypatch.setitem(loop._TRACKERS, 'wandb', lambda: False)
    config = override(TINY.finetune('TeCoA'), **SMALL, **{'train.trackers': [name]})
    with pytest.raises(AgftError, match=message):
        finetune(config, tmp_path/'run', 'cpu')
    assert not (tmp_path/'run').exists()


def test_live_curves_replace_their_figure(monkeypatch):
    shown = []
    handle = SimpleNamespace(update=lambda fig: shown.append(('update', fig)))
    def display(fig, display_id):
        shown.append(('new', fig))
        return handle
    monkeypatch.setattr(pytest.importorskip('IPython.display'), 'display', display)
    live = LiveCurves(every=math.inf)
    for step in range(5):
        live(dict(step=step, loss=1., robust=.5), 5)
    live.draw()
    assert [how for how, _ in shown] == ['new', 'update']
    left, right = shown[-1][1].axes
    assert len(left.lines[0].get_xdata()) == 5 and len(right.lines) == 1
