"Every field of a fine-tuning configuration changes what it should, and run.json is the configuration."
import errno
import json
import math
import os
import shutil
import signal
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import agft.loop as loop
import agft.train as train
from agft import __version__
from agft.attack import LOSSES, apgd, in_ball, margin_loss, pgd
from agft.config import FinetuneConfig, OptimConfig, load_preset, override, recorded
from agft.core import AgftError, NotFinite, read_json, seeded
from agft.data import Task, load_task
from agft.loop import Stepper, fit, learning_rate, load_tensors, read_log
from agft.methods import METHODS, Method
from agft.model import ZeroShotCLIP, copy_model, fingerprint, from_modules
from agft.threats import THREATS, register_attack
from agft.train import finetune, prepare_run
from agft.weights import checkpoint_info, load_model

LR, EPS = .01, 4/255
TINY = load_preset('tiny')


@pytest.fixture(scope='module')
def model(): return load_model('agft-tiny')


@pytest.fixture(scope='module')
def task(): return load_task('texture', n=16, split='train')


def config(method='TeCoA', **changes)->FinetuneConfig:
    "A run of one step of 8 images without warm-up and clipping, changed: train__steps is train.steps."
    small = {'train.images': None, 'train.batch_size': 8, 'train.steps': 1, 'train.warmup': 0.,
             'train.grad_clip': None, 'method.lr': LR}
    for key, value in changes.items():
        small[key.replace('__', '.')] = value
    return override(TINY.finetune(method), **small)


@pytest.fixture
def tuned(tmp_path, model, task):
    "Weights of the image encoder after a run, and its folder."
    count = iter(range(1000))
    def run(method='TeCoA', **changes):
        out = tmp_path/f'run{next(count)}'
        student = finetune(config(method, **changes), out, 'cpu', model, task)
        return dict(student.visual.named_parameters()), out
    return run


@pytest.fixture
def attacked(monkeypatch, model, task):
    "Clean and adversarial images of the first step, and the run."
    def run(method='TeCoA', **changes):
        seen, prepared = [], prepare_run(config(method, **changes), 'cpu', model, task)
        kind = type(prepared.method)
        loss = kind.loss
        def spy(self, models, batch, x_adv, target):
            seen.append((batch, x_adv))
            return loss(self, models, batch, x_adv, target)
        with monkeypatch.context() as patch:
            patch.setattr(kind, 'loss', spy)
            prepared.loss_fn()(0)
        batch, x_adv = seen[0]
        return batch, x_adv, prepared
    return run


def largest_change(weights, others):
    return max((weights[key] - others[key]).abs().max().item() for key in weights)


# -- train

def test_steps(tuned):
    _, out = tuned(train__steps=3)
    assert [line['step'] for line in read_log(out)] == [0, 1, 2]


def test_optimizer(tuned, model):
    "The first step of SGD is proportional to the gradient; that of AdamW has length lr in every entry."
    sgd, _ = tuned()
    adamw, _ = tuned(train__optimizer='adamw', method__lr=1e-4)
    before = dict(model.visual.named_parameters())
    moved = torch.cat([(adamw[key] - before[key]).abs().flatten() for key in before])
    assert moved.median().item() == pytest.approx(1e-4, rel=.02)
    lengths = torch.cat([(sgd[key] - before[key]).abs().flatten() for key in before])
    assert lengths.max() > 100*lengths.median()


def test_momentum(tuned, model):
    "After two steps, momentum m has added lr(1)·m times the first gradient."
    before = dict(model.visual.named_parameters())
    first, _ = tuned(train__momentum=.9)
    same, _ = tuned(train__momentum=0.)
    assert largest_change(first, same) == 0
    without, _ = tuned(train__steps=2, train__momentum=0.)
    with_momentum, _ = tuned(train__steps=2, train__momentum=.9)
    for key in ('conv1.weight', 'attnpool.c_proj.weight'):
        gradient = (before[key] - first[key])/LR
        added = without[key] - with_momentum[key]
        torch.testing.assert_close(added, learning_rate(1, 2, LR)*.9*gradient, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize('betas', [(.5, .98), (.9, .5)])
def test_betas(tuned, betas):
    "With bias correction the first step of AdamW does not depend on the betas; the second one does."
    adamw = dict(train__optimizer='adamw', method__lr=1e-4)
    first, second = tuned(**adamw)[0], tuned(train__betas=betas, **adamw)[0]
    assert largest_change(first, second) < 1e-6
    first, second = tuned(train__steps=2, **adamw)[0], tuned(train__steps=2, train__betas=betas, **adamw)[0]
    assert largest_change(first, second) > 1e-6


@pytest.mark.parametrize('optimizer', ['sgd', 'adamw'])
def test_weight_decay_changes_matrices_and_not_biases(tuned, model, optimizer):
    "A step with decay differs from one without by lr·decay·weight, on tensors of two or more dimensions."
    plain, _ = tuned(train__optimizer=optimizer)
    decayed, _ = tuned(train__optimizer=optimizer, train__weight_decay=.1)
    dimensions = set()
    for key, weight in model.visual.named_parameters():
        shrunk = plain[key] - decayed[key]
        expected = LR*.1*weight if weight.ndim > 1 else torch.zeros_like(weight)
        torch.testing.assert_close(shrunk, expected, rtol=1e-3, atol=1e-6)
        if weight.ndim < 2:
            assert torch.equal(plain[key], decayed[key])
        dimensions.add(weight.ndim)
    assert {1, 2, 4} <= dimensions


def test_warmup_and_lr(tuned):
    _, out = tuned(train__steps=4, train__warmup=.5)
    assert [line['lr'] for line in read_log(out)] == pytest.approx([LR/2, LR, LR, LR/2])
    _, out = tuned(train__steps=2)
    assert [line['lr'] for line in read_log(out)] == pytest.approx([LR, LR/2])


def test_grad_clip_bounds_the_norm(tuned, model):
    before = dict(model.visual.named_parameters())
    free, out = tuned()
    log = read_log(out)[0]
    assert log['clipped_norm'] == log['grad_norm'] > .1
    clipped, out = tuned(train__grad_clip=.1)
    assert read_log(out)[0]['grad_norm'] == log['grad_norm'] and read_log(out)[0]['clipped_norm'] == .1
    def norm(weights): return math.hypot(*((weights[key] - before[key]).norm().item() for key in before))
    assert norm(clipped) == pytest.approx(LR*.1, rel=1e-3)
    assert norm(free) == pytest.approx(LR*log['grad_norm'], rel=1e-3)


def test_checkpoint_every(tuned, monkeypatch):
    saved, save = [], loop.save_tensors
    def spy(content, path):
        if 'step' in content:
            saved.append(content['step'])
        save(content, path)
    monkeypatch.setattr(loop, 'save_tensors', spy)
    tuned(train__steps=5, train__checkpoint_every=2)
    assert saved == [2, 4, 5]


@pytest.mark.parametrize('precision', ['tf32', 'bf16', 'fp16'])
def test_every_precision_trains(tuned, precision):
    exact, _ = tuned('AGFT', train__steps=2, train__grad_clip=1.)
    rough, _ = tuned('AGFT', train__steps=2, train__grad_clip=1., train__precision=precision)
    allowed = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    assert allowed == (('high', True) if precision == 'tf32' else ('highest', False))
    change = largest_change(exact, rough)
    assert change < 1e-2
    assert (change == 0) == (precision == 'tf32')  # which is fp32 on a CPU


def test_scaled_gradients_are_those_without_a_scale(tmp_path):
    plain, loss_fn = line()
    fit(plain, loss_fn, tmp_path/'plain', OptimConfig(steps=4), .1)
    scaled, loss_fn = line()
    fit(scaled, loss_fn, tmp_path/'scaled', OptimConfig(steps=4), .1, half=True)
    assert scaled.weight.item() == pytest.approx(plain.weight.item(), rel=1e-6)
    assert load_tensors(tmp_path/'scaled'/'state.pt')['scaler']['scale'] > 1


GPU = pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU'))

@pytest.mark.parametrize('device', ['cpu', GPU])
@pytest.mark.parametrize('optimizer', ['sgd', 'adamw'])
def test_a_step_that_overflows_leaves_no_trace(optimizer, device):
    "PyTorch's fused SGD takes the gradient into its momentum."
    def trained(*steps):
        net, _ = line()
        stepper = Stepper(net.to(device), OptimConfig(steps=4, optimizer=optimizer), .1, half=True)
        for step in steps:
            stepper(step, lambda step: (net.weight.sum()*(1e38 if step == 0 else 1.), {}))
        return net.weight.item()
    assert trained(1, 2, 3) == trained(0, 1, 2, 3) < 1


def transformer():
    "A small vision transformer of open_clip with random weights."
    import open_clip
    torch.manual_seed(0)
    text:Any = dict(context_length=16, vocab_size=49408, width=32, heads=1, layers=1)
    vision:Any = dict(image_size=32, patch_size=8, width=64, layers=2)
    network:Any = open_clip.CLIP(32, vision, text)
    network.visual.set_grad_checkpointing(False)
    return ZeroShotCLIP(network, open_clip.get_tokenizer('ViT-B-32', context_length=16), 'small',
                        preprocess=dict(size=32, mean=(.5,)*3, std=(.5,)*3))


def test_checkpointed_activations_change_nothing_but_memory(tmp_path, task):
    def run(name, **changes):
        asked = config('AGFT', train__steps=2, **changes)
        return dict(finetune(asked, tmp_path/name, 'cpu', transformer(), task).visual.named_parameters())
    plain, checkpointed = run('a'), run('b', train__checkpoint_activations=True)
    assert largest_change(plain, checkpointed) < 1e-6
    with pytest.raises(AgftError, match='checkpoint_activations needs a vision transformer'):
        prepare_run(config(train__checkpoint_activations=True))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('g++') is None, reason='torch.compile needs a compiler')
def test_a_compiled_encoder_learns_the_same(tmp_path, task):
    def run(name, **changes):
        asked = config('AGFT', train__steps=2, **changes)
        return dict(finetune(asked, tmp_path/name, 'cpu', transformer(), task).visual.named_parameters())
    assert largest_change(run('a'), run('b', train__compile=True)) < 1e-4


def test_precision(tuned, attacked):
    exact, _ = tuned()
    rough, out = tuned(train__precision='bf16')
    assert largest_change(exact, rough) > 1e-6
    assert {p.dtype for p in rough.values()} == {torch.float32}
    _, _, run = attacked(train__precision='bf16')
    assert run.models.student.precision == run.models.teacher.precision == 'bf16'


@pytest.mark.parametrize('adapter', ['encoder', 'pixel-prompt', 'lora'])
def test_adapter(tuned, model, adapter):
    if adapter == 'lora':
        pytest.importorskip('peft')
    weights, out = tuned(train__adapter=adapter, train__steps=2, method__lr=.1)
    before = dict(model.visual.named_parameters())
    moved = {key for key in before if not torch.equal(weights[key], before[key])}
    if adapter == 'pixel-prompt':
        assert not moved
    if adapter == 'lora':
        assert moved and all(before[key].ndim == 4 for key in moved)
    if adapter == 'encoder':
        assert len(moved) == len(before)
    assert checkpoint_info(out/'model.safetensors')['train.adapter'] == adapter
    assert bool(load_model(out/'model.safetensors').learned_inputs) == (adapter == 'pixel-prompt')


def test_images_and_batch_size(attacked, model, task):
    batch, _, run = attacked()
    assert len(batch.x) == 8 and len(run.task) == 16
    batch, _, fewer = attacked(train__images=5, train__batch_size=4)
    assert len(batch.x) == 4 and len(fewer.task) == 5
    assert fewer.inputs['images'] != run.inputs['images']
    with pytest.raises(AgftError, match='train.batch_size is 17; allowed: 1 .* to 16 '):
        prepare_run(config(train__batch_size=17), 'cpu', model, task)


# -- attack

def test_eps_bounds_the_change(attacked):
    for eps in (1/255, 8/255):
        batch, x_adv, _ = attacked(attack__eps=eps, attack__alpha=1.)
        change = (x_adv - batch.x).abs()
        assert change.max().item() == pytest.approx(eps, abs=1e-6)
        inside = (batch.x > eps) & (batch.x < 1 - eps)
        assert (change[inside] > .99*eps).float().mean() > .99   # a long step ends on the border of the ball


def test_alpha_is_the_step_length(attacked):
    one_step = dict(attack__eps=8/255, attack__steps=1, attack__random_start=False)
    for alpha in (1/255, 3/255):
        batch, x_adv, _ = attacked(attack__alpha=alpha, **one_step)
        change = (x_adv - batch.x).abs()
        inside = (batch.x > alpha) & (batch.x < 1 - alpha)
        torch.testing.assert_close(change[inside], torch.full_like(change[inside], alpha), rtol=0, atol=1e-6)


def test_steps_of_the_attack(attacked):
    still = dict(attack__alpha=1/255, attack__eps=8/255, attack__random_start=False)
    for steps in (0, 1, 4):
        batch, x_adv, _ = attacked(attack__steps=steps, **still)
        assert (x_adv - batch.x).abs().max().item() == pytest.approx(steps/255, abs=1e-6)


def test_random_start(attacked):
    batch, x_adv, _ = attacked(attack__steps=0)
    assert not torch.equal(x_adv, batch.x) and (x_adv - batch.x).abs().max() <= EPS + 1e-6
    start = (batch.x + EPS*(2*torch.rand(batch.x.shape, generator=seeded(0, 'start', 0)) - 1)).clamp(0, 1)
    torch.testing.assert_close(x_adv, start, rtol=0, atol=1e-6)
    batch, x_adv, _ = attacked(attack__steps=0, attack__random_start=False)
    assert torch.equal(x_adv, batch.x)


def test_norm(attacked):
    batch, x_adv, _ = attacked(attack__norm='L2', attack__eps=.5, attack__alpha=.5)
    lengths = (x_adv - batch.x).flatten(1).norm(dim=1)
    assert (lengths <= .5 + 1e-5).all() and lengths.max() > .4
    assert (x_adv - batch.x).abs().max() > EPS


def test_loss(attacked):
    batch, own, run = attacked('TeCoA')
    _, same, _ = attacked('TeCoA', attack__loss='cross-entropy')
    assert torch.equal(own, same)                                 # the method's own loss is the cross-entropy
    for method in ('TeCoA', 'AGFT', 'FARE'):
        batch, other, run = attacked(method, attack__loss='margin')
        def logits(x, run=run): return run.method.logit_scale*run.models.student.cosines(x, run.models.head)
        start = seeded(0, 'start', 0)
        by_hand = pgd(logits, batch.x, batch.y, EPS, EPS, 2, start, 'Linf', margin_loss)
        assert torch.equal(other, by_hand)
        assert not torch.equal(other, attacked(method)[1])
    assert not torch.equal(attacked('AGFT', attack__loss='cross-entropy')[1], attacked('AGFT')[1])
    assert not torch.equal(attacked('AGFT', attack__loss='dlr')[1], other)


@pytest.fixture
def own_attack():
    "A registered attack with its own settings, removed afterwards."
    calls = []
    @register_attack('lighter', 1)
    def lighter(logits_fn, x, y, eps, norm, generator, loss=None, alpha=0.):
        calls.append(dict(loss=loss, alpha=alpha, eps=eps, norm=norm))
        return (x + eps).clamp(0, 1)
    yield calls
    del THREATS['lighter']


def test_name_of_a_registered_attack(attacked, own_attack):
    batch, x_adv, run = attacked('AGFT', attack__name='lighter', attack__alpha=1/255)
    torch.testing.assert_close(x_adv, (batch.x + EPS).clamp(0, 1), rtol=0, atol=1e-6)
    assert own_attack == [dict(loss=run.method.attack_loss, alpha=1/255, eps=EPS, norm='Linf')]
    attacked('AGFT', attack__name='lighter', attack__loss='margin')
    assert own_attack[1]['loss'] is margin_loss


# -- method, seed, plugins

@pytest.mark.parametrize('method, field, value, numbers', [
    ('AGFT', 'logit_scale', 20., ('loss',)),
    ('AGFT', 'gamma', .9, ('loss',)),
    ('PMG-AFT', 'alpha', 3., ('loss',)),
    ('PMG-AFT', 'beta', 3., ('loss',)),
    ('PMG-AFT', 'reduction', 'mean', ('loss', 'kl_teacher', 'kl_clean')),
    ('TRADES-AGFT', 'beta', 1., ('loss',))])
def test_hyper_parameters(tuned, method, field, value, numbers):
    logs = []
    for changes in ({}, {f'method__{field}': value}):
        _, out = tuned(method, train__steps=2, **changes)   # in the first step the student is the teacher
        logs.append(read_log(out)[1])
    for number in numbers:
        assert logs[0][number] != logs[1][number]


def test_without_a_logit_scale_it_is_the_models(model, task):
    run = prepare_run(config('TeCoA'), 'cpu', model, task)
    assert run.method.logit_scale == model.logit_scale and run.config.method.logit_scale is None


def test_clean_is_not_attacked(attacked):
    batch, x_adv, _ = attacked('Clean')
    assert torch.equal(batch.x, x_adv)


def test_seed(attacked, tuned):
    batch, x_adv, _ = attacked()
    other, other_adv, _ = attacked(seed=1)
    assert not torch.equal(batch.x, other.x)
    weights, others, again = tuned()[0], tuned(seed=1)[0], tuned()[0]
    assert largest_change(weights, others) > 0 and largest_change(weights, again) == 0


PLUGIN = '''
from dataclasses import dataclass
from agft.methods import AGFT, register_method
from agft.threats import register_attack

@register_method('shifted')
@dataclass(frozen=True)
class Shifted(AGFT):
    shift:float=0.
    def loss(self, models, batch, x_adv, target):
        loss, numbers = super().loss(models, batch, x_adv, target)
        return loss + self.shift, numbers

@register_attack('darker', 1)
def darker(logits_fn, x, y, eps, norm, generator, loss=None): return (x - eps).clamp(0, 1)
'''


def test_plugins_and_options(tmp_path, tuned):
    path = tmp_path/'plugin.py'
    path.write_text(PLUGIN)
    own = dict(plugins=(str(path),), attack__name='darker', method__name='shifted')
    try:
        plain, shifted = tuned('AGFT', **own), tuned('AGFT', method__options={'shift': 3.}, **own)
        losses = [read_log(out)[0]['loss'] for _, out in (plain, shifted)]
        assert losses[1] - losses[0] == pytest.approx(3, abs=1e-5)
        assert read_json(shifted[1]/'run.json')['method']['options'] == {'shift': 3.}
    finally:
        METHODS.pop('shifted', None)
        THREATS.pop('darker', None)


# -- model and data

def test_model(task):
    run = prepare_run(config(model__resize='bicubic'), 'cpu', task=task)
    assert run.models.student.resize == run.models.teacher.resize == 'bicubic'
    other = prepare_run(config('FARE', model__name='agft-photo'), 'cpu', task=task)
    assert other.models.student.name == 'agft-photo'
    assert other.inputs['teacher'] == fingerprint(load_model('agft-photo')) != run.inputs['teacher']


def test_data(tmp_path, model):
    for name in ('cat', 'dog'):
        (tmp_path/name).mkdir()
        for i in range(6):
            Image.new('RGB', (50, 40), (40*i, 10, 10)).save(tmp_path/name/f'{i}.png')
    own:dict[str, Any] = dict(data__source=str(tmp_path), data__prompts=('my {}.',), data__size=24,
                              train__batch_size=4)
    run = prepare_run(config(**own), 'cpu', model)
    assert run.task.templates == ('my {}.',) and run.task.classes == ('cat', 'dog')
    assert run.task.resolution == 24


def test_the_folder_of_the_images_is_used_and_not_recorded(monkeypatch, model, task):
    asked = []
    def spy(data, name, n, split):
        asked.append((data.root, name, n, split))
        return task
    monkeypatch.setattr(train, 'task_of', spy)
    run = prepare_run(config(data__root='/data', data__source='cifar10', train__images=9), 'cpu', model)
    assert asked == [('/data', 'cifar10', 9, 'train')]
    assert 'root' not in run.about['data'] and run.config.data.root == '/data'


def test_run_json_equals_the_config(tuned, tmp_path, model, task):
    asked = config('AGFT', train__weight_decay=.1, train__betas=(.8, .9), attack__eps='3/255', seed=4)
    finetune(asked, tmp_path/'out', 'cpu', model, task)
    written = read_json(tmp_path/'out'/'run.json')
    expected = recorded(override(asked, **{'data.source': 'texture', 'model.resize': model.resize}))
    inputs = dict(teacher=fingerprint(model), images=task.digest())
    assert written == dict(command='train', version=__version__, **expected, inputs=inputs)
    notes = checkpoint_info(tmp_path/'out'/'model.safetensors')
    assert notes['model'] == 'agft-tiny' and notes['method'] == 'AGFT' and notes['source'] == 'texture'
    assert notes['train.betas'] == [.8, .9] and notes['attack.eps'] == '3/255' and notes['seed'] == 4


# -- the run as a whole

def test_a_killed_run_ends_with_the_same_bits(tmp_path, model, task, interrupted):
    asked = config('AGFT', train__steps=5, train__checkpoint_every=2)
    whole = finetune(asked, tmp_path/'whole', 'cpu', model, task)
    interrupted(4, lambda: finetune(asked, tmp_path/'killed', 'cpu', model, task))
    assert len(read_log(tmp_path/'killed')) == 3 and (tmp_path/'killed'/'teacher.pt').exists()
    again = finetune(asked, tmp_path/'killed', 'cpu', model, task)
    assert fingerprint(again) == fingerprint(whole)
    assert [line['step'] for line in read_log(tmp_path/'killed')] == [0, 1, 2, 3, 4]
    assert not (tmp_path/'killed'/'teacher.pt').exists()


def test_a_finished_run_is_read_and_another_run_is_refused(tmp_path, model, task, monkeypatch):
    student = finetune(config(), tmp_path, 'cpu', model, task)
    with monkeypatch.context() as patch:
        patch.setattr(train, 'fit', None)
        assert fingerprint(finetune(config(), tmp_path, 'cpu', model, task)) == fingerprint(student)
    with pytest.raises(AgftError, match=r'method\.lr \(0\.01 there, 0\.02 now\)'):
        finetune(config(method__lr=.02), tmp_path, 'cpu', model, task)


def own_model():
    "Two encoders that agft cannot make by name."
    torch.manual_seed(0)
    images = nn.Sequential(nn.Flatten(), nn.Linear(3*8*8, 16), nn.Tanh(), nn.Linear(16, 4))
    def texts(names): return torch.stack([torch.randn(4, generator=seeded('text', name)) for name in names])
    return from_modules(images, texts, (.5,)*3, (.5,)*3, 8, 20., name='two layers')


@pytest.mark.parametrize('method', ['TeCoA', 'AGFT', 'FARE', 'PMG-AFT'])
def test_a_model_of_your_own(tmp_path, task, method):
    mine = own_model()
    before = fingerprint(mine)
    asked = config(method, train__steps=2, method__lr=.1, method__logit_scale=None)
    student = finetune(asked, tmp_path, 'cpu', mine, task)
    assert fingerprint(mine) == before != fingerprint(student) and student.name == 'two layers'
    notes = checkpoint_info(tmp_path/'model.safetensors')
    assert notes['model'] == 'two layers' and read_json(tmp_path/'run.json')['model']['name'] == 'two layers'
    assert fingerprint(finetune(asked, tmp_path, 'cpu', mine, task)) == fingerprint(student)


def test_a_model_without_parameters_cannot_be_tuned(task):
    def images(x): return x.flatten(1)[:, :4]
    def texts(names): return torch.ones(len(names), 4)
    fixed = from_modules(images, texts, (.5,)*3, (.5,)*3, 8, 20.)
    with pytest.raises(AgftError, match='no parameters'):
        prepare_run(config(), 'cpu', fixed, task)


def test_unlabelled_images(tmp_path, model, task):
    unlabelled = Task('mine', task.images, None, task.classes, task.templates)
    student = finetune(config('AGFT'), tmp_path/'a', 'cpu', model, unlabelled)
    labelled = finetune(config('AGFT'), tmp_path/'b', 'cpu', model, task)
    assert fingerprint(student) == fingerprint(labelled)          # AGFT reads no label
    assert 'robust' not in read_log(tmp_path/'a')[0] and 'robust' in read_log(tmp_path/'b')[0]
    with pytest.raises(AgftError, match='PMG-AFT reads labels, and mine has none'):
        prepare_run(config('PMG-AFT'), 'cpu', model, unlabelled)
    with pytest.raises(AgftError, match='attack.loss is .margin., which needs labels, and mine has none'):
        prepare_run(config('AGFT', attack__loss='margin'), 'cpu', model, unlabelled)


@pytest.mark.parametrize('changes, words', [
    (dict(method__name='AGTF'), ['AGTF', 'TeCoA']),
    (dict(method__gamma=.5), ['TeCoA has no gamma; it takes logit_scale']),
    (dict(method__options={'sure': 1.}), ['TeCoA has no sure']),
    (dict(method__lr=None), ['TeCoA', '--method.lr']),
    (dict(train__adapter='LoRA'), ['LoRA', 'lora']),
    (dict(attack__name='pgd20'), ['pgd20', 'allowed in training: pgd']),
    (dict(attack__loss='hinge'), ['hinge', 'method, cross-entropy, margin, dlr']),
    (dict(attack__eps=4.), ['eps is 4', 'write 4/255']),
    (dict(plugins=('no_such_plugin',)), ['no_such_plugin'])])
def test_mistakes_are_found_before_anything_is_loaded(tmp_path, monkeypatch, changes, words):
    monkeypatch.setattr(train, 'load_model', None)
    monkeypatch.setattr(train, 'task_of', None)
    with pytest.raises(AgftError) as e:
        finetune(config(**changes), tmp_path/'out')
    assert all(word in str(e.value) for word in words) and '\n' not in str(e.value)
    assert not (tmp_path/'out').exists()


def test_a_folder_that_holds_something_else_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'load_model', None)
    (tmp_path/'notes.txt').write_text('mine')
    with pytest.raises(AgftError, match='is not empty'):
        finetune(config(), tmp_path)


# -- the loop

def line(x=1.):
    "A module with one weight, and the loss that pulls it to zero."
    net = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(x)
    return net, lambda step: (net.weight.square().sum(), {})


def test_sgd_by_hand(tmp_path):
    "Two steps of SGD with momentum on w²: v = m·v + 2w, w = w - lr·v."
    net, loss_fn = line()
    fit(net, loss_fn, tmp_path, OptimConfig(steps=2, momentum=.5), .1)
    w = 1 - .1*2
    w -= .05*(.5*2 + 2*w)
    assert net.weight.item() == pytest.approx(w)


def test_a_run_that_diverges_says_so(tmp_path):
    net, _ = line()
    with pytest.raises(NotFinite, match='mine: the loss is nan at step 0, learning rate 0.1; there is'):
        fit(net, lambda step: (net.weight.sum()*math.nan, {}), tmp_path/'a', OptimConfig(steps=2), .1, 'mine')
    net, _ = line()
    with pytest.raises(NotFinite, match='the gradient is .* at step 0'):
        def kink(step): return (net.weight - 1).abs().sqrt().sum(), {}
        fit(net, kink, tmp_path/'b', OptimConfig(steps=2), .1)
    with pytest.raises(AgftError, match='lr is 0'):
        fit(*line(), tmp_path/'c', OptimConfig(steps=2), 0.)


def test_a_damaged_checkpoint_is_named(tmp_path):
    fit(*line(), tmp_path, OptimConfig(steps=2), .1)
    (tmp_path/'state.pt').write_bytes(b'cut')
    with pytest.raises(AgftError, match='state.pt cannot be read; remove it'):
        fit(*line(), tmp_path, OptimConfig(steps=2), .1)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    fit(*line(), tmp_path, OptimConfig(steps=2), .1, about={'seed': 0})
    with pytest.raises(AgftError, match=r'state.pt is of another run, .* seed \(0 there, 1 now\)'):
        fit(*line(), tmp_path, OptimConfig(steps=2), .1, about={'seed': 1})


@pytest.mark.parametrize('at', [.3, .5, .7, .95])
def test_a_flipped_byte_in_a_checkpoint_is_refused_or_has_no_effect(tmp_path, at):
    net, loss_fn = line()
    fit(net, loss_fn, tmp_path, OptimConfig(steps=2, momentum=.5), .1)
    file = tmp_path/'state.pt'
    held = bytearray(file.read_bytes())
    held[int(at*len(held))] ^= 64
    file.write_bytes(held)
    again, loss_fn = line()
    try:
        fit(again, loss_fn, tmp_path, OptimConfig(steps=2, momentum=.5), .1)
    except AgftError:
        return
    assert again.weight.item() == net.weight.item()


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step(tmp_path, number):
    whole, loss_fn = line()
    fit(whole, loss_fn, tmp_path/'whole', OptimConfig(steps=6), .1)
    net, loss_fn = line()
    def signalled(step):
        if step == 3:
            signal.raise_signal(number)
        return loss_fn(step)
    with pytest.raises(BaseException) as ended:
        fit(net, signalled, tmp_path/'a', OptimConfig(steps=6), .1)
    assert isinstance(ended.value, KeyboardInterrupt if number == signal.SIGINT else SystemExit)
    assert load_tensors(tmp_path/'a'/'state.pt')['step'] == 4 == len(read_log(tmp_path/'a'))
    net, loss_fn = line()
    fit(net, loss_fn, tmp_path/'a', OptimConfig(steps=6), .1)
    assert net.weight.item() == whole.weight.item()


def test_a_log_that_was_cut_is_read(tmp_path):
    fit(*line(), tmp_path, OptimConfig(steps=3), .1)
    with open(tmp_path/'log.jsonl', 'a') as log:
        log.write('{"step": 2, "loss": 7.0}\n[1, 2]\n{"step": 3, "lo')
    log = read_log(tmp_path)
    assert [entry['step'] for entry in log] == [0, 1, 2] and log[2]['loss'] == 7


def test_a_full_disk_names_the_last_checkpoint(tmp_path, monkeypatch):
    net, loss_fn = line()
    synced = os.fsync
    calls = []
    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 2:  # the first checkpoint is two files: itself and its folder
            raise OSError(errno.ENOSPC, 'No space left on device')
        synced(descriptor)
    with monkeypatch.context() as patch, pytest.raises(AgftError, match='No space left .* after step 2$'):
        patch.setattr(os, 'fsync', full)
        fit(net, loss_fn, tmp_path, OptimConfig(steps=6, checkpoint_every=2), .1)
    assert load_tensors(tmp_path/'state.pt')['step'] == 2
    assert not list(tmp_path.glob('.*.tmp'))


def test_a_diverged_run_goes_on_with_a_lower_rate(tmp_path, model, task, monkeypatch):
    loss, calls = Method.loss, []
    def explodes(self, *args):
        value, numbers = loss(self, *args)
        calls.append(0)
        return (value*math.nan if len(calls) == 4 else value), numbers
    with monkeypatch.context() as patch, pytest.raises(NotFinite, match='step 3.*after step 2; a lower'):
        patch.setattr(Method, 'loss', explodes)
        finetune(config(train__steps=5, train__checkpoint_every=2), tmp_path/'a', 'cpu', model, task)
    lower:dict[str, Any] = dict(train__steps=5, train__checkpoint_every=2)
    lower['train__start_from'] = str(tmp_path/'a')
    finetune(config(method__lr=.001, **lower), tmp_path/'b', 'cpu', model, task)
    rates = [entry['lr'] for entry in read_log(tmp_path/'b')]
    assert len(rates) == 5 and max(rates[2:]) <= .001 < rates[1]
    with pytest.raises(AgftError, match='seed'):
        finetune(config(method__lr=.001, seed=1, **lower), tmp_path/'c', 'cpu', model, task)


def test_the_plan_of_a_run_is_json():
    long = {'train.images': 64, 'train.batch_size': 8, 'train.steps': 100_000}  # hours have two digits
    few = override(TINY.finetune('AGFT'), **long)
    plan = train.dry_run(few, 'cpu', 1)
    assert json.loads(json.dumps(plan)) == plan
    assert plan['epochs'] == 12_500 and plan['images'] == 64
    assert isinstance(plan['hours'], float) and plan['hours'] > 0


def test_a_copied_model_is_trained_and_the_original_kept(tmp_path, model, task):
    mine = copy_model(model)
    mine.precision = 'bf16'
    student = finetune(config(), tmp_path, 'cpu', mine, task)
    assert mine.precision == 'bf16' and fingerprint(mine) == fingerprint(model) != fingerprint(student)
    assert not any(p.requires_grad for p in student.parameters()) and not student.training


# -- what a step asks of the device

class Waits(TorchDispatchMode):
    "Counts the operations whose result the program must read before it can go on."
    READ = '_local_scalar_dense', 'nonzero', 'is_nonzero', 'equal', 'masked_select', 'unique'
    def __init__(self):
        super().__init__()
        self.seen = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in func.name() for name in self.READ):
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('attack', ['pgd', 'apgd'])
@pytest.mark.parametrize('name', [name for name in METHODS if not name.startswith('TGA-ZSR')])
def test_a_step_reads_nothing_back_before_its_end(model, task, name, attack):
    run = prepare_run(config(name, attack__name=attack, train__grad_clip=1.), 'cpu', model, task)
    stepper, loss_fn = Stepper(run.models.student, run.config.train, 1e-3), run.loss_fn()
    with Waits() as waits:
        line = stepper(0, loss_fn)
    assert waits.seen == [] and math.isfinite(line['loss'])


def test_the_count_of_waits_counts():
    with Waits() as waits:
        assert torch.ones(2).sum().item() == 2 and len(torch.eye(2).nonzero()) == 2
        assert (torch.ones(3) > 0).all()
    assert len(waits.seen) == 3


# -- other attacks in training

OTHERS = {
    'L2': dict(attack__norm='L2', attack__eps=.5, attack__steps=3),
    'more steps': dict(attack__steps=7, attack__alpha=1/255),
    'FGSM with a random start': dict(attack__steps=1, attack__alpha=1.25*EPS),
    'FGSM': dict(attack__steps=1, attack__random_start=False),
    'Auto-PGD': dict(attack__name='apgd', attack__steps=5),
    'Auto-PGD, L2': dict(attack__name='apgd', attack__norm='L2', attack__eps=.5, attack__steps=5),
    'Auto-PGD, DLR': dict(attack__name='apgd', attack__loss='dlr', attack__steps=5)}


@pytest.mark.parametrize('name', [name for name in METHODS if not name.startswith(('TGA-ZSR', 'Clean'))])
def test_every_method_trains_with_other_attacks(attacked, name):
    for how, changes in OTHERS.items():
        if name == 'FARE' and how == 'FGSM':
            continue  # the gradient of its loss is zero at the clean image, up to rounding
        batch, x_adv, run = attacked(name, **(dict(attack__eps=EPS) | changes))
        attack = run.config.attack
        assert in_ball(x_adv, batch.x, attack.eps, attack.norm).all(), how
        assert (x_adv != batch.x).flatten(1).any(1).all(), how
        loss = run.method.attack_loss if attack.loss == 'method' else LOSSES[attack.loss]
        target = run.method.target(run.models, batch) if attack.loss == 'method' else batch.y
        outputs = [run.method.outputs(run.models, batch, x) if attack.loss == 'method'
                   else run.method.logits(run.models, x) for x in (batch.x, x_adv)]
        before, after = (loss(values, target)[0].mean() for values in outputs)
        assert after > before, how


def test_auto_pgd_in_training_is_auto_pgd(attacked):
    batch, x_adv, run = attacked('TeCoA', attack__name='apgd', attack__steps=5, attack__random_start=False)
    def logits_fn(x): return run.method.logits(run.models, x)
    expected = apgd(logits_fn, batch.x, batch.y, run.config.attack.eps, 5, early_stop=False)
    assert (x_adv == expected).all()
