"Losses and gradients of every method against the published formulas, and adapters that tune, save and load."
import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F

from agft.adapters import ADAPTERS, merge_lora
from agft.attack import pgd
from agft.config import AttackConfig, MethodConfig, TrainConfig
from agft.core import AgftError, seeded
from agft.data import Task
from agft.methods import (
    AGFT,
    METHODS,
    Batch,
    Method,
    Models,
    attention_map,
    method,
    method_of,
    register_method,
    soft_targets,
)
from agft.model import ZeroShotCLIP, fingerprint, interpolate
from agft.train import adversarial_loss
from agft.weights import load_model, new_model, save_model

B, C, D, HW, S = 6, 5, 7, 4, 20.
VIT = dict(patch_size=8, width=32, layers=2)
RESNET = dict(layers=[1, 1, 1, 1], width=8)
TEXT = open_clip.CLIPTextCfg(context_length=8, vocab_size=64, width=16, heads=2, layers=1)


class Linear(torch.nn.Module):
    "A linear encoder in double precision: all that a method asks of a student."
    device = torch.device('cpu')

    def __init__(self, seed):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(3*HW*HW, D, generator=seeded(seed), dtype=torch.float64))

    def features(self, x): return x.flatten(1).double() @ self.w
    def encode_image(self, x): return F.normalize(self.features(x), dim=-1)
    def cosines(self, x, head): return self.encode_image(x) @ head.T


@pytest.fixture
def case():
    g = seeded('case')
    images = torch.randint(0, 256, (B, 3, HW, HW), generator=g, dtype=torch.uint8)
    x_adv = torch.rand(B, 3, HW, HW, generator=g)
    head = F.normalize(torch.randn(C, D, generator=g, dtype=torch.float64), dim=1)
    y = torch.randint(C, (B,), generator=g)
    student:Any = Linear('student')
    teacher:Any = Linear('teacher')
    models = Models(student, teacher, head)
    captions = F.normalize(torch.randn(B, D, generator=g, dtype=torch.float64), dim=1)
    return SimpleNamespace(images=images, x=images/255, x_adv=x_adv, y=y, models=models, captions=captions)


def log_probabilities(model, x, head, scale=S):
    z = x.flatten(1).double() @ model.w
    return torch.log_softmax(scale * (z / z.norm(dim=1, keepdim=True)) @ head.T, 1)


def divergence(p, q): return (p.exp()*(p - q)).sum(1)


def flyp(s, t, c):
    "InfoNCE in both directions, two distances and two divergences, as AdvFLYP's public code has them."
    def unit(model, x): return F.normalize(x.flatten(1).double() @ model.w, dim=1)
    adv, clean, original = unit(s, c.x_adv), unit(s, c.x), unit(t, c.x_adv).detach()
    logits, own = S*adv @ c.captions.T, torch.arange(B)
    nce = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))/2
    distances = (adv - original).norm(dim=1).mean() + (adv - clean).norm(dim=1).mean()
    p, q, r = [(S*z @ c.captions.T).log_softmax(1) for z in (adv, original, clean)]
    return nce + distances + divergence(p, q).mean() + divergence(p, r).mean()


def written_out(name, c):
    "The formulas of the papers and their code, without a line of agft's."
    s, t, head = c.models
    adv = log_probabilities(s, c.x_adv, head)
    clean = log_probabilities(s, c.x, head)
    teacher_adv = log_probabilities(t, c.x_adv, head).detach()
    rows = torch.arange(B)
    hard = -adv[rows, c.y].mean()
    def p_rob(gamma): return log_probabilities(t, c.x, head, gamma*S).exp().detach()
    def fare():
        change = c.x_adv.flatten(1).double() @ s.w - (c.x.flatten(1).double() @ t.w).detach()
        return (change**2).sum(1).mean()
    formulas = {
        'TeCoA': lambda: hard,
        'Clean': lambda: -clean[rows, c.y].mean(),
        'AGFT': lambda: -(p_rob(.4)*adv).sum(1).mean(),
        'Soft': lambda: -(p_rob(1.)*adv).sum(1).mean(),
        'PMG-AFT': lambda: hard + divergence(teacher_adv, adv).sum() + divergence(clean, adv).sum(),
        'PMG-AFT-mean': lambda: hard + divergence(teacher_adv, adv).mean() + divergence(clean, adv).mean(),
        'AdvFLYP': lambda: flyp(s, t, c),
        'TRADES-AGFT': lambda: -(p_rob(.4)*clean).sum(1).mean() + 6*divergence(clean, adv).mean(),
        'FARE': fare}
    return formulas[name]()


WITHOUT_PATCHES = [name for name in METHODS if not name.startswith('TGA-ZSR')]
WITHOUT_CAPTIONS = [name for name in WITHOUT_PATCHES if not METHODS[name].reads_captions]
ATTACKING = [name for name in WITHOUT_PATCHES if name != 'Clean']


@pytest.mark.parametrize('name', WITHOUT_PATCHES)
def test_loss_and_gradient_are_the_published_formula(case, name):
    m = method(name, logit_scale=S)
    batch = Batch(case.x, case.y, m.teacher_features(case.models.teacher, case.x), captions=case.captions)
    student = case.models.student
    x_adv = case.x if m.attack_loss is None else case.x_adv
    ours, _ = m.loss(case.models, batch, x_adv, m.target(case.models, batch))
    (g,) = torch.autograd.grad(ours, student.w)
    theirs = written_out(name, case)
    (h,) = torch.autograd.grad(theirs, student.w)
    assert abs(ours.item() - theirs.item()) <= 1e-6*max(1, abs(theirs.item()))
    assert (g - h).abs().max() <= 1e-5*max(1, h.abs().max().item())


@pytest.mark.parametrize('name', ATTACKING)
def test_the_attack_ascends_what_the_method_says(case, name):
    m = method(name, logit_scale=S)
    batch = Batch(case.x, case.y, m.teacher_features(case.models.teacher, case.x), captions=case.captions)
    target = m.target(case.models, batch)
    def outputs(x): return m.outputs(case.models, batch, x)
    attack_loss = m.attack_loss
    assert attack_loss is not None
    def value(x): return attack_loss(outputs(x), target)[0]
    x_adv = pgd(outputs, case.x, target, .1, .05, 5, seeded('start'), loss=attack_loss)
    assert (value(x_adv) > value(case.x)).all()
    assert (x_adv - case.x).abs().max() <= .1 + 1e-6
    out = outputs(case.x.double().requires_grad_())
    loss, slope = attack_loss(out, target)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), out, retain_graph=True)[0], slope)


def test_pmg_variants_differ_by_the_batch(case):
    batch, log = Batch(case.x, case.y), {}
    for name in ('PMG-AFT', 'PMG-AFT-mean'):
        _, log[name] = method(name, logit_scale=S).loss(case.models, batch, case.x_adv, case.y)
    for key in ('kl_teacher', 'kl_clean'):
        assert log['PMG-AFT'][key] == pytest.approx(B*log['PMG-AFT-mean'][key])
    assert log['PMG-AFT']['ce'] == log['PMG-AFT-mean']['ce']


@pytest.mark.parametrize('name', [name for name in METHODS if not METHODS[name].reads_labels])
def test_a_method_that_reads_no_labels_needs_none(case, name):
    m = method(name, logit_scale=S)
    features = m.teacher_features(case.models.teacher, case.x)
    def loss(y):
        batch = Batch(case.x, y, features, captions=case.captions)
        return m.loss(case.models, batch, case.x_adv, m.target(case.models, batch))
    with_labels, log = loss(case.y)
    without, shorter = loss(None)
    assert with_labels.item() == without.item()
    assert log.keys() - shorter.keys() == {'robust'}


@pytest.mark.parametrize('name', [name for name in METHODS if METHODS[name].reads_labels])
def test_a_method_that_reads_labels_says_so(case, name):
    with pytest.raises(AgftError, match='labels'):
        method(name).target(case.models, Batch(case.x, None))


def small(**vision):
    "A dual encoder of random weights."
    torch.manual_seed(0)
    tower = open_clip.CLIPVisionCfg(image_size=32, head_width=16, **vision)
    model = open_clip.CLIP(16, tower, TEXT)
    visual:Any = model.visual
    visual.image_mean = visual.image_std = (.5, .5, .5)
    return ZeroShotCLIP(model, None, 'small').requires_grad_(False).eval()


def map_by_hand(model, x, text):
    "The attention map as TGA-ZSR's official code computes it."
    v, n = model.visual, len(x)
    tokens = v.conv1((x - model.mean)/model.std).flatten(2).transpose(1, 2)
    tokens = torch.cat([v.class_embedding.expand(n, 1, -1), tokens], 1) + v.positional_embedding
    tokens = v.ln_pre(tokens)
    for block in v.transformer.resblocks:
        tokens = block(tokens)
    z = v.ln_post(tokens) @ v.proj
    z = (z/z.norm(dim=1, keepdim=True))[:, 1:]  # over the tokens
    a = (z * text[:, None]).sum(2)
    low, high = a.min(1, keepdim=True)[0], a.max(1, keepdim=True)[0]
    a = ((a - low)/(high - low)).reshape(n, 1, 4, 4)
    return F.interpolate(a, (32, 32), mode='bilinear').reshape(n, -1)


def test_tga_is_its_official_code_on_a_vision_transformer():
    student, teacher, g = small(**VIT), small(**VIT), seeded('tga')
    for p in student.visual.parameters():
        p += .1*torch.randn(p.shape, generator=g)
    student.visual.requires_grad_(True)
    x, x_adv = torch.rand(4, 3, 32, 32, generator=g), torch.rand(4, 3, 32, 32, generator=g)
    y, head = torch.tensor([0, 2, 1, 2]), F.normalize(torch.randn(3, 16, generator=g), dim=1)
    text = head[y]
    torch.testing.assert_close(attention_map(student, x, text), map_by_hand(student, x, text))
    m, models, batch = method('TGA-ZSR'), Models(student, teacher, head), Batch(x, y)
    m.fits(student)
    loss, _ = m.loss(models, batch, x_adv, y)
    ce = F.cross_entropy(100*student.cosines(x_adv, head), y)
    teacher_map = map_by_hand(teacher, x, text)
    adv = torch.norm(map_by_hand(student, x_adv, text) - teacher_map, dim=1, p=2).mean()
    clean = torch.norm(map_by_hand(student, x, text) - teacher_map, dim=1, p=2).mean()
    theirs = ce + .08*adv + .05*clean
    torch.testing.assert_close(loss, theirs)
    params = list(student.visual.parameters())
    ours = torch.autograd.grad(loss, params, retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad(theirs, params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # AGFT's re-implementation exchanges the weights and takes the norm along an axis of size one: far weaker
    adv = torch.norm((map_by_hand(student, x_adv, text) - teacher_map)[:, None], dim=1, p=2).mean()
    clean = torch.norm((map_by_hand(student, x, text) - teacher_map)[:, None], dim=1, p=2).mean()
    weaker, _ = method('TGA-ZSR-mean').loss(models, batch, x_adv, y)
    torch.testing.assert_close(weaker, ce + .05*adv + .08*clean)
    assert loss - ce > 10*(weaker - ce)


def test_a_teacher_with_batch_norm_stays_as_it_is():
    teacher, student = small(**RESNET), small(**RESNET)
    student.visual.requires_grad_(True)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    task = Task('t', images, torch.arange(8) % 3, ('a', 'b', 'c'), ('{}',))
    models = Models(student, teacher, F.normalize(torch.randn(3, 16), dim=1))
    def statistics(): return [b.clone() for name, b in student.named_buffers() if 'running' in name]
    teacher_before, student_before, norms = fingerprint(teacher), fingerprint(student), statistics()
    assert norms
    for name in WITHOUT_CAPTIONS:
        loss_fn = adversarial_loss(models, method(name), task, AttackConfig(), TrainConfig(batch_size=4))
        opt = torch.optim.SGD(student.visual.parameters(), lr=1e-4)
        for step in range(2):
            opt.zero_grad()
            loss_fn(step)[0].backward()
            opt.step()
    assert fingerprint(teacher) == teacher_before and fingerprint(student) != student_before
    assert all(torch.equal(a, b) for a, b in zip(norms, statistics(), strict=True))


@pytest.mark.parametrize('name, settings, words', [
    ('AGTF', {}, ['AGTF', 'TeCoA']),
    ('AGFT', dict(gamma=0), ['gamma is 0']),
    ('AGFT', dict(gamma=1.5), ['1.5']),
    ('TeCoA', dict(logit_scale=-1), ['logit_scale is -1', 'above 0']),
    ('TeCoA', dict(gamma=.5), ['TeCoA has no gamma; it takes logit_scale']),
    ('PMG-AFT', dict(reduction='max'), ['max', 'sum, mean']),
    ('PMG-AFT', dict(alpha=-1), ['alpha is -1']),
    ('TGA-ZSR', dict(beta=-1), ['beta is -1']),
    ('TRADES-AGFT', dict(beta=-2), ['beta is -2'])])
def test_what_is_out_of_range_is_refused(name, settings, words):
    with pytest.raises(AgftError) as e:
        method(name, **settings)
    assert all(word in str(e.value) for word in words)


def test_a_method_of_your_own(monkeypatch):
    for name in ('mine', 'plain'):
        monkeypatch.setitem(METHODS, name, None)
    for name in ('mine', 'plain'):
        monkeypatch.delitem(METHODS, name)

    @register_method('mine')
    class Mine(AGFT):
        "Without @dataclass, which the decorator adds."
        sure:float = .5

    @register_method('plain')
    @dataclass(frozen=True)
    class Plain(Method):
        pass

    own:Any = Mine  # the decorator gives it a constructor
    model:Any = SimpleNamespace(logit_scale=47.)
    assert method_of(MethodConfig('mine', options=dict(sure=.7)), model) == own(47., .4, sure=.7)
    assert method_of(MethodConfig('plain', logit_scale=3.), model) == Plain(3.)
    with pytest.raises(AgftError, match='mine has no sur; it takes logit_scale, gamma, scale_warmup, sure'):
        method('mine', sur=1)
    with pytest.raises(AgftError, match='another name'):
        register_method('TeCoA')(Mine)
    no_method:Any = int
    with pytest.raises(AgftError, match='subclass of Method'):
        register_method('number')(no_method)


def test_a_scale_warmup_keeps_the_target_and_raises_the_students_scale(case):
    m = method('AGFT', logit_scale=100., gamma=.4, scale_warmup=.5)
    batch = Batch(case.x, case.y, m.teacher_features(case.models.teacher, case.x))
    for done, scale in ((0., 40.), (.25, 70.), (.5, 100.), (.9, 100.)):
        now:Any = m.at(done)
        assert now.logit_scale == pytest.approx(scale) and now.gamma*now.logit_scale == pytest.approx(40.)
        torch.testing.assert_close(now.target(case.models, batch), m.target(case.models, batch))
    assert method('TeCoA').at(.1) == method('TeCoA') and m.at(.5) is m


def test_tga_refuses_an_encoder_without_patches():
    with pytest.raises(AgftError, match='vision transformer.*agft-tiny'):
        method('TGA-ZSR').fits(load_model('agft-tiny'))


def test_soft_targets_at_the_papers_setting_are_those_of_the_formula(case):
    cos = case.models.teacher.cosines(case.x, case.models.head)
    torch.testing.assert_close(soft_targets(cos, 180., .4), (72*cos).softmax(1))


# -- adapters

@pytest.fixture
def vit(monkeypatch):
    "A small vision transformer that open_clip knows by name."
    text = dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1)
    config = dict(embed_dim=16, vision_cfg=dict(image_size=32, head_width=16, **VIT), text_cfg=text)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, 'agft-test-vit', config)
    torch.manual_seed(0)
    return new_model('agft-test-vit')


@pytest.mark.parametrize('name', ADAPTERS)
def test_every_adapter_learns_saves_and_loads(name, vit, tmp_path):
    "What is tuned moves, nothing else does, and the checkpoint gives the same logits."
    student, path = vit, tmp_path/'m.safetensors'
    before = {key: value.clone() for key, value in student.model.state_dict().items()}
    x = torch.rand(4, 3, 32, 32, generator=seeded('x'))
    head = F.normalize(torch.randn(3, 16, generator=seeded('head')), dim=1)
    plain = student.cosines(x, head)
    ADAPTERS[name](student)
    tuned = [p for p in student.parameters() if p.requires_grad]
    assert tuned and sum(p.numel() for p in tuned) < sum(p.numel() for p in student.parameters())
    if name != 'token-prompt':
        torch.testing.assert_close(student.cosines(x, head), plain)
    opt = torch.optim.SGD(tuned, lr=1.)
    for _ in range(2):
        opt.zero_grad()
        student.cosines(x, head)[:, 0].sum().backward()
        opt.step()
    moved = student.cosines(x, head).detach()
    assert (moved - plain).abs().max() > 1e-4
    save_model(merge_lora(student), path)
    again = load_model(path)
    torch.testing.assert_close(again.cosines(x, head), moved, rtol=1e-4, atol=1e-5)
    state = again.model.state_dict()
    if name in ('encoder', 'lora'):
        assert set(state) == set(before) and not again.learned_inputs
        changed = [key for key in state if not torch.equal(state[key], before[key])]
        assert all(key.startswith('visual.') for key in changed)
        other:Any = open_clip.create_model('agft-test-vit', pretrained=str(path)).eval()
        theirs = F.normalize(other.encode_image((x - again.mean)/again.std), dim=1) @ head.T
        torch.testing.assert_close(theirs, moved, rtol=1e-4, atol=1e-5)
    else:
        assert all(torch.equal(state[key], before[key]) for key in before)
    if name == 'pixel-prompt':
        frame = again.learned_inputs['pixels'][0]
        assert frame[:, 4:-4, 4:-4].abs().max() == 0 and frame[:, :4].abs().max() > 0


def test_low_rank_changes_have_low_rank():
    student = load_model('agft-tiny')
    before = {key: value.clone() for key, value in student.visual.state_dict().items()}
    ADAPTERS['lora'](student)
    for name, p in student.named_parameters():
        if 'lora_B' in name:
            p.data.normal_(generator=seeded(name))
    for key, value in merge_lora(student).visual.state_dict().items():
        moved = not torch.equal(value, before[key])
        convolution = key.endswith('weight') and value.ndim == 4
        assert moved == convolution, key
        if not moved:
            continue
        change = (value - before[key]).flatten(1).double()
        assert torch.linalg.matrix_rank(change, rtol=1e-3) <= 8


def test_low_rank_changes_leave_the_global_generator_as_it_was():
    student, before = load_model('agft-tiny'), torch.random.get_rng_state()
    ADAPTERS['lora'](student)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_token_prompt_needs_a_transformer():
    with pytest.raises(AgftError, match='vision transformer.*agft-tiny'):
        ADAPTERS['token-prompt'](load_model('agft-tiny'))


def test_weights_between_two_models():
    a, b = load_model('agft-tiny'), load_model('agft-tiny')
    for p in b.visual.parameters():
        p.data += .01
    for share, end in ((0., a), (1., b)):
        mixed = interpolate(a, b, share).model.state_dict().values()
        for p, q in zip(mixed, end.model.state_dict().values(), strict=True):
            assert torch.equal(p, q)
    half = interpolate(a, b, .5)
    first, expected = half.visual.get_parameter('conv1.weight'), a.visual.get_parameter('conv1.weight') + .005
    torch.testing.assert_close(first, expected)
    assert fingerprint(a) == fingerprint(load_model('agft-tiny'))
    with pytest.raises(AgftError, match='1.5'):
        interpolate(a, b, 1.5)


def test_tga_refuses_an_encoder_that_pools_its_patches(tmp_path, monkeypatch):
    "CoCa has patches, a transformer and a projection, but of other widths."
    for table in ('_MODEL_CONFIGS', '_MODEL_CONFIG_PATHS'):
        monkeypatch.setattr(open_clip.factory, table, getattr(open_clip.factory, table).copy())
    tower = dict(context_length=77, vocab_size=49408, width=64, heads=1, layers=1)
    pooled = dict(image_size=32, patch_size=8, width=64, layers=1, attentional_pool=True, attn_pooler_heads=2)
    config = dict(embed_dim=32, custom_text=True, vision_cfg=pooled | dict(output_tokens=True),
                  text_cfg=tower | dict(embed_cls=True, output_tokens=True),
                  multimodal_cfg=tower | dict(context_length=76, attn_pooler_heads=2))
    (tmp_path/'coca-test.json').write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    model = new_model('coca-test')
    assert model.head(['cat', 'dog'], ['a {}']).shape == (2, 32)
    with pytest.raises(AgftError, match='coca-test pools its patches'):
        method('TGA-ZSR').fits(model)
