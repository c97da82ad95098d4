"Every method's loss and gradient against its published formula, written out once more on fixed tensors."
from types import SimpleNamespace

import open_clip, pytest, torch, torch.nn.functional as F

from agft.align import soft_targets
from agft.attack import pgd
from agft.clip import ZeroShotCLIP, fingerprint, interpolate, load_clip, new_clip, save_clip
from agft.core import AgftError, seeded
from agft.data import Task
from agft.methods import METHODS, Batch, Models, attention_map, method
from agft.train import PARTS, adversarial_loss, merged

B, C, D, HW, S = 6, 5, 7, 4, 20.
VIT, RESNET = dict(patch_size=8, width=32, layers=2), dict(layers=[1, 1, 1, 1], width=8)


class Linear(torch.nn.Module):
    "A linear encoder in double precision: all that a method asks of a student."
    def __init__(self, seed):
        super().__init__()
        self.w, self.mean = torch.nn.Parameter(torch.randn(3*HW*HW, D, generator=seeded(seed), dtype=torch.float64)), torch.zeros(1)
    def features(self, x): return x.flatten(1).double() @ self.w
    def encode_image(self, x): return F.normalize(self.features(x), dim=-1)
    def cosines(self, x, head): return self.encode_image(x) @ head.T


@pytest.fixture
def case():
    g = seeded('case')
    images = torch.randint(0, 256, (B, 3, HW, HW), generator=g, dtype=torch.uint8)
    x, x_adv = images/255, torch.rand(B, 3, HW, HW, generator=g)
    head = F.normalize(torch.randn(C, D, generator=g, dtype=torch.float64), dim=1)
    return SimpleNamespace(images=images, x=x, x_adv=x_adv, y=torch.randint(C, (B,), generator=g), models=Models(Linear('student'), Linear('teacher'), head))


def logp(model, x, head, scale=S):
    z = x.flatten(1).double() @ model.w
    return torch.log_softmax(scale * (z / z.norm(dim=1, keepdim=True)) @ head.T, 1)


def divergence(p, q): return (p.exp()*(p - q)).sum(1)


def written_out(name, c):
    "The formulas of the papers and their code, without a line of agft's."
    s, t, head = c.models
    adv, clean = logp(s, c.x_adv, head), logp(s, c.x, head)
    frozen_adv = logp(t, c.x_adv, head).detach()
    hard = -adv[torch.arange(B), c.y].mean()
    def p_rob(gamma): return logp(t, c.x, head, gamma*S).exp().detach()
    return {'TeCoA': lambda: hard,
            'Clean': lambda: -clean[torch.arange(B), c.y].mean(),
            'AGFT': lambda: -(p_rob(.4)*adv).sum(1).mean(),
            'Soft': lambda: -(p_rob(1.)*adv).sum(1).mean(),
            'PMG-AFT': lambda: hard + divergence(adv, frozen_adv).sum() + divergence(adv, clean).sum(),
            'PMG-AFT-mean': lambda: hard + divergence(adv, frozen_adv).mean() + divergence(adv, clean).mean(),
            'TRADES-AGFT': lambda: -(p_rob(.4)*clean).sum(1).mean() + 6*divergence(clean, adv).mean(),
            'FARE': lambda: ((c.x_adv.flatten(1).double() @ s.w - (c.x.flatten(1).double() @ t.w).detach())**2).sum(1).mean()}[name]()


@pytest.mark.parametrize('name', [m for m in METHODS if m != 'TGA-ZSR'])
def test_loss_and_gradient_are_the_published_formula(case, name):
    m = method(name, scale=S)
    batch = Batch(case.x, case.y, m.prepare(case.models.teacher, case.images))
    student = case.models.student
    ours, _ = m.loss(case.models, batch, case.x if m.attack_loss is None else case.x_adv, m.target(case.models, batch))
    (g,) = torch.autograd.grad(ours, student.w)
    theirs = written_out(name, case)
    (h,) = torch.autograd.grad(theirs, student.w)
    assert abs(ours.item() - theirs.item()) <= 1e-6*max(1, abs(theirs.item()))
    assert (g - h).abs().max() <= 1e-5*max(1, h.abs().max().item())


@pytest.mark.parametrize('name', [m for m in METHODS if m not in ('TGA-ZSR', 'Clean')])
def test_the_attack_ascends_what_the_method_says(case, name):
    m = method(name, scale=S)
    batch = Batch(case.x, case.y, m.prepare(case.models.teacher, case.images))
    target = m.target(case.models, batch)
    value = lambda x: m.attack_loss(m.outputs(case.models, batch, x), target)[0]
    x_adv = pgd(lambda x: m.outputs(case.models, batch, x), case.x, target, .1, .05, 5, seeded('start'), loss=m.attack_loss)
    assert (value(x_adv) > value(case.x)).all() and (x_adv - case.x).abs().max() <= .1 + 1e-6
    x, z = case.x.double().requires_grad_(), None
    out = m.outputs(case.models, batch, x)
    value, slope = m.attack_loss(out, target)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), out, retain_graph=True)[0], slope)


def test_pmg_variants_differ_by_the_batch(case):
    batch, parts = Batch(case.x, case.y), {}
    for name in ('PMG-AFT', 'PMG-AFT-mean'): parts[name] = method(name, scale=S).loss(case.models, batch, case.x_adv, case.y)[1]
    for k in ('strays', 'bends'): assert parts['PMG-AFT'][k] == pytest.approx(B*parts['PMG-AFT-mean'][k])
    assert parts['PMG-AFT']['ce'] == parts['PMG-AFT-mean']['ce']


def small(**vision):
    "A dual encoder of random weights."
    torch.manual_seed(0)
    model = open_clip.CLIP(16, dict(image_size=32, head_width=16, **vision), dict(context_length=8, vocab_size=64, width=16, heads=2, layers=1))
    model.visual.image_mean = model.visual.image_std = (.5, .5, .5)
    return ZeroShotCLIP(model, None, 'small').requires_grad_(False).eval()


def test_tga_is_its_official_code_on_a_vision_transformer():
    student, teacher, g = small(**VIT), small(**VIT), seeded('tga')
    for p in student.model.visual.parameters(): p += .1*torch.randn(p.shape, generator=g)
    student.model.visual.requires_grad_(True)
    x, x_adv, y = torch.rand(4, 3, 32, 32, generator=g), torch.rand(4, 3, 32, 32, generator=g), torch.tensor([0, 2, 1, 2])
    head = F.normalize(torch.randn(3, 16, generator=g), dim=1)
    def by_hand(model, x):
        v, x = model.model.visual, (x - model.mean)/model.std
        x = v.conv1(x).flatten(2).transpose(1, 2)
        x = v.ln_pre(torch.cat([v.class_embedding.expand(4, 1, -1), x], 1) + v.positional_embedding)
        for block in v.transformer.resblocks: x = block(x)
        z = v.ln_post(x)[:, 1:] @ v.proj
        a = (z/z.norm(dim=2, keepdim=True) * head[y][:, None]).sum(2)
        a = (a - a.min(1, keepdim=True)[0])/(a.max(1, keepdim=True)[0] - a.min(1, keepdim=True)[0])
        return F.interpolate(a.reshape(4, 1, 4, 4), (32, 32), mode='bilinear').reshape(4, -1)
    torch.testing.assert_close(attention_map(student, x, head[y]), by_hand(student, x))
    m, models, batch = method('TGA-ZSR'), Models(student, teacher, head), Batch(x, y)
    m.fits(student)
    loss, parts = m.loss(models, batch, x_adv, y)
    ce = F.cross_entropy(100*student.cosines(x_adv, head), y)
    far = [torch.norm(by_hand(student, v) - by_hand(teacher, x), dim=1, p=2).mean() for v in (x_adv, x)]
    torch.testing.assert_close(loss, ce + .08*far[0] + .05*far[1])
    params = [p for p in student.model.visual.parameters()]
    for a, b in zip(torch.autograd.grad(loss, params, retain_graph=True), torch.autograd.grad(ce + .08*far[0] + .05*far[1], params)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # AGFT's re-implementation: the weights swapped, the norm along an axis of size one. That is another, far weaker method.
    other = .05*torch.norm((by_hand(student, x_adv) - by_hand(teacher, x))[:, None], dim=1, p=2).mean() \
        + .08*torch.norm((by_hand(student, x) - by_hand(teacher, x))[:, None], dim=1, p=2).mean()
    assert (loss - ce) > 10*other


def test_a_teacher_with_batch_norm_stays_as_it_is():
    teacher, student = small(**RESNET), small(**RESNET)
    student.model.visual.requires_grad_(True)
    images, y = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 3
    task = Task('t', images, y, ('a', 'b', 'c'), ('{}',))
    models = Models(student, teacher, F.normalize(torch.randn(3, 16), dim=1))
    before, norms = fingerprint(teacher), [b.clone() for n, b in student.named_buffers() if 'running' in n]
    assert norms
    for name in METHODS:
        if name == 'TGA-ZSR': continue
        loss_fn = adversarial_loss(models, method(name), task, batch_size=4)
        for step in range(2):
            opt = torch.optim.SGD(student.model.visual.parameters(), lr=1e-4)
            opt.zero_grad(); loss_fn(step)[0].backward(); opt.step()
    assert fingerprint(teacher) == before and fingerprint(student) != before
    assert all(torch.equal(a, b) for a, b in zip(norms, [b for n, b in student.named_buffers() if 'running' in n]))


@pytest.mark.parametrize('name, kw, words', [
    ('AGTF', {}, ['AGTF', 'TeCoA']), ('AGFT', dict(gamma=0), ['gamma is 0']), ('AGFT', dict(gamma=1.5), ['1.5']), ('TeCoA', dict(scale=-1), ['-1', 'above 0']),
    ('PMG-AFT', dict(reduction='max'), ['max', 'sum, mean']), ('PMG-AFT', dict(alpha=-1), ['alpha is -1']), ('TRADES-AGFT', dict(beta=-2), ['beta is -2'])])
def test_what_is_out_of_range_is_refused(name, kw, words):
    with pytest.raises(AgftError) as e: method(name, **kw)
    assert all(w in str(e.value) for w in words)


def test_tga_refuses_an_encoder_without_patches():
    with pytest.raises(AgftError, match='vision transformer.*agft-tiny'): method('TGA-ZSR').fits(load_clip('agft-tiny'))


def test_soft_targets_at_the_papers_setting_are_those_of_the_formula(case):
    cos = case.models.teacher.cosines(case.x, case.models.head)
    torch.testing.assert_close(soft_targets(cos, 180., .4), (72*cos).softmax(1))


@pytest.mark.parametrize('part', PARTS)
def test_every_part_learns_saves_and_loads(part, tmp_path, monkeypatch):
    "What is tuned moves, nothing else does, and the checkpoint gives the same logits."
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, 'agft-test-vit', dict(
        embed_dim=16, vision_cfg=dict(image_size=32, head_width=16, **VIT), text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1)))
    torch.manual_seed(0)
    student = new_clip('agft-test-vit')
    before = {k: v.clone() for k, v in student.model.state_dict().items()}
    x, head = torch.rand(4, 3, 32, 32, generator=seeded('x')), F.normalize(torch.randn(3, 16, generator=seeded('head')), dim=1)
    plain = student.cosines(x, head)
    PARTS[part](student)
    free = [p for p in student.parameters() if p.requires_grad]
    assert free and sum(p.numel() for p in free) < sum(p.numel() for p in student.parameters())
    if part != 'token-prompt': torch.testing.assert_close(student.cosines(x, head), plain)       # the others start from the encoder as it was
    opt = torch.optim.SGD(free, lr=1.)
    for _ in range(2): opt.zero_grad(); student.cosines(x, head)[:, 0].sum().backward(); opt.step()
    moved = student.cosines(x, head).detach()
    assert (moved - plain).abs().max() > 1e-4
    save_clip(merged(student), tmp_path/'m.safetensors')
    again = load_clip(tmp_path/'m.safetensors')
    torch.testing.assert_close(again.cosines(x, head), moved, rtol=1e-4, atol=1e-5)
    state = again.model.state_dict()
    if part in ('encoder', 'lora'):
        assert set(state) == set(before) and not again.prompts
        assert {k for k in state if not torch.equal(state[k], before[k])} <= {k for k in state if k.startswith('visual.')}
        other = open_clip.create_model('agft-test-vit', pretrained=str(tmp_path/'m.safetensors')).eval()
        torch.testing.assert_close(F.normalize(other.encode_image((x - again.mean)/again.std), dim=1) @ head.T, moved, rtol=1e-4, atol=1e-5)
    else: assert all(torch.equal(state[k], before[k]) for k in before)
    if part == 'pixel-prompt':
        prompt = again.prompts['pixels'][0]
        assert prompt[:, 4:-4, 4:-4].abs().max() == 0 and prompt[:, :4].abs().max() > 0


def test_low_rank_changes_have_low_rank():
    student = load_clip('agft-tiny')
    before = {k: v.clone() for k, v in student.model.visual.state_dict().items()}
    PARTS['lora'](student)
    for n, p in student.named_parameters():
        if 'lora_B' in n: p.data.normal_(generator=seeded(n))
    for k, v in merged(student).model.visual.state_dict().items():
        moved = not torch.equal(v, before[k])
        assert moved == (k.endswith('weight') and v.ndim == 4), k                  # every convolution, and nothing else
        if moved: assert torch.linalg.matrix_rank((v - before[k]).flatten(1).double(), rtol=1e-3) <= 8


def test_a_token_prompt_needs_a_transformer():
    with pytest.raises(AgftError, match='vision transformer.*agft-tiny'): PARTS['token-prompt'](load_clip('agft-tiny'))


def test_weights_between_two_models(tmp_path):
    a, b = load_clip('agft-tiny'), load_clip('agft-tiny')
    for p in b.model.visual.parameters(): p.data += .01
    for share, end in ((0., a), (1., b)):
        for p, q in zip(interpolate(a, b, share).model.state_dict().values(), end.model.state_dict().values()): assert torch.equal(p, q)
    half = interpolate(a, b, .5)
    torch.testing.assert_close(half.model.visual.conv1.weight, a.model.visual.conv1.weight + .005)
    assert fingerprint(a) == fingerprint(load_clip('agft-tiny'))
    with pytest.raises(AgftError, match='1.5'): interpolate(a, b, 1.5)
