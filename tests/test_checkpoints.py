"Files of weights in the layouts of other projects, each made here, and the files that agft writes."
import os
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchvision.transforms import Compose

from agft import hub
from agft.cli import main
from agft.config import AttackConfig, TrainConfig
from agft.core import AgftError, NotFinite, asset, read_json, seeded, write_json
from agft.data import Task, archives_dir
from agft.evaluation import Flags
from agft.methods import Models, method
from agft.model import add_learned_input, copy_model, fingerprint, from_modules
from agft.registry import decode
from agft.results import Results, summarise
from agft.train import adversarial_loss
from agft.weights import (
    _check_gelu,
    checkpoint_info,
    load_model,
    load_visual,
    load_weights,
    new_model,
    read_notes,
    save_model,
)

TEXTS = ['a red circle', 'two hearts', 'a letter g']
SMALL = dict(embed_dim=32, vision_cfg=dict(image_size=32, patch_size=8, width=64, layers=2),
             text_cfg=dict(context_length=77, vocab_size=49408, width=64, heads=1, layers=2))
CONFIGS = {'agft-test': SMALL, 'agft-test-quickgelu': dict(SMALL, quick_gelu=True),
           'agft-test-sigmoid': dict(SMALL, init_logit_bias=-10, custom_text=True)}


@pytest.fixture(autouse=True)
def configs(architectures):
    "Small architectures from JSON files of the user's."
    architectures(CONFIGS)


def make_model(name, seed=0):
    "A model of random weights; its logit scale and bias are not those it starts with."
    torch.manual_seed(seed)
    model = new_model(name)
    for p in model.parameters():
        p += .02*torch.randn(p.shape)
    return model


def make_images(model, n=2): return torch.rand(n, 3, *model.size, generator=seeded('images'))


def open_logits(model, ours, x):
    return model.eval().get_logits((x - ours.mean)/ours.std, ours.tokenizer(TEXTS))[0]


def same_logits(ours, model):
    "Our logits and open_clip's of the same images are equal."
    x = make_images(ours)
    logits = ours.logits(x, ours.encode_text(TEXTS))
    torch.testing.assert_close(logits, open_logits(model, ours, x), rtol=1e-5, atol=1e-5)


def as_published(key, value):
    "Half-precision matrices; vectors and the token table in single precision."
    if not value.is_floating_point():
        return value
    return value.half() if value.ndim > 1 and 'embedding.weight' not in key else value.half().float()


def openai_file(state, path, script):
    "A file as OpenAI publishes it, with three more numbers: a TorchScript archive, or its state_dict."
    state = {k: as_published(k, v) for k, v in state.items()}
    numbers = dict(input_resolution=32, context_length=77, vocab_size=49408)
    state |= {k: torch.tensor(v) for k, v in numbers.items()}
    if not script:
        torch.save(state, path)
        return
    root = torch.nn.Module()
    for k, v in state.items():
        at, (*parents, last) = root, k.split('.')
        for part in parents:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        at.register_buffer(last, v)
    torch.jit.script(root).save(str(path))


@pytest.mark.filterwarnings('ignore:.*torch.jit')
@pytest.mark.parametrize('script', [True, False], ids=['archive', 'state_dict'])
def test_openai_files_read_as_open_clips_own_reader_does(tmp_path, script):
    path = tmp_path/'m.pt'
    openai_file(make_model('agft-test-quickgelu').model.state_dict(), path, script)
    theirs = open_clip.load_openai_model(str(path), 'fp32', 'cpu')
    same_logits(load_model('agft-test-quickgelu', path), theirs)
    with pytest.raises(AgftError, match='trained with quick-gelu.*allowed: agft-test-quickgelu$'):
        load_model('agft-test', path)


@pytest.mark.parametrize('file', ['m.pt', 'm.bin', 'm.safetensors'])
@pytest.mark.parametrize('name', ['agft-test', 'agft-test-sigmoid'])
def test_open_clip_files(tmp_path, name, file):
    model, path = make_model(name), tmp_path/file
    state = {k: v.contiguous() for k, v in model.model.state_dict().items()}
    wrapped = dict(epoch=3, name='x', state_dict={f'module.{k}': v for k, v in state.items()}, optimizer={})
    if file == 'm.pt':
        torch.save(wrapped, path)
    else:
        (save_file if 'safe' in file else torch.save)(state, path)
    assert fingerprint(load_model(name, path)) == fingerprint(model)


@pytest.mark.parametrize('act, name, other', [('quick_gelu', 'agft-test-quickgelu', 'agft-test'),
                                              ('gelu', 'agft-test', 'agft-test-quickgelu')])
def test_transformers_files_give_transformers_logits(tmp_path, act, name, other):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    tower = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1,
                 hidden_act=act)
    text = dict(tower, vocab_size=49408, max_position_embeddings=77, eos_token_id=49407)
    vision = dict(tower, image_size=32, patch_size=8)
    config = transformers.CLIPConfig(projection_dim=32, vision_config=vision, text_config=text)
    theirs = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p += .02*torch.randn(p.shape)
    theirs.save_pretrained(tmp_path)
    model = load_model(name, tmp_path/'model.safetensors')
    x = make_images(model)
    assert model.tokenizer is not None
    outputs = theirs(input_ids=model.tokenizer(TEXTS), pixel_values=(x - model.mean)/model.std)
    logits = model.logits(x, model.encode_text(TEXTS))
    torch.testing.assert_close(logits, outputs.logits_per_image, rtol=1e-4, atol=1e-4)
    with pytest.raises(AgftError, match=f'quick-gelu.*allowed: {name}$'):
        load_model(other, tmp_path/'model.safetensors')


@pytest.mark.parametrize('name, tag, allowed', [
    ('ViT-B-32', 'openai', 'ViT-B-32-quickgelu'),
    ('RN50x4', 'openai', 'RN50x4-quickgelu'),
    ('ViT-L-14', 'dfn2b', 'ViT-L-14-quickgelu'),
    ('ViT-B-32-quickgelu', 'laion2b_s34b_b79k', 'ViT-B-32')])
def test_tags_that_need_another_activation(name, tag, allowed):
    with pytest.raises(AgftError, match=f'allowed: {allowed}$'):
        load_model(name, tag)
    _check_gelu(allowed, tag, {}, {})


def test_a_tag_without_a_twin_is_accepted(): _check_gelu('roberta-ViT-B-32', 'laion2b_s12b_b32k', {}, {})


def wrapped(layout, visual):
    "An image encoder as each project saves it."
    if layout in ('TeCoA', 'TGA-ZSR'):  # TGA-ZSR began as TeCoA's code; the accuracy is a NumPy number
        return dict(epoch=10, state_dict={}, add_prompter=dict(prompt=torch.zeros(1, 0, 768)),
                    vision_encoder_state_dict=visual, best_acc1=np.mean([51., 52.]),
                    optimizer=dict(state={}, param_groups=[dict(lr=1e-5, params=[0])]))
    if layout == 'RobustVLM':
        return visual
    if layout == 'AdvFLYP':  # its code began as TeCoA's, and saves the tuned part of the whole model
        prompt, tuned = dict(prompt=torch.zeros(1, 0, 768)), {f'visual.{k}': v for k, v in visual.items()}
        return dict(epoch=1, state_dict={}, add_prompter=prompt, partial_state_dict=tuned, best_acc1=51.,
                    optimizer=dict(state={}, param_groups=[dict(lr=1e-4, params=[0])]))
    return dict(modules={'clip.visual': {k: v.half() for k, v in visual.items()}}, params={})


@pytest.mark.parametrize('layout', ['TeCoA', 'TGA-ZSR', 'RobustVLM', 'AGFT', 'AdvFLYP'])
def test_image_encoders_of_other_methods(tmp_path, layout):
    tuned, base = make_model('agft-test-quickgelu', 1), make_model('agft-test-quickgelu', 2)
    path = tmp_path/'c.pth.tar'
    torch.save(wrapped(layout, tuned.visual.state_dict()), path)
    x, text = make_images(base), base.encode_text(TEXTS)
    assert load_visual(base, path) is base
    if layout != 'RobustVLM':
        with pytest.raises(AgftError, match='allowed: agft-test-quickgelu$'):
            load_visual(make_model('agft-test'), path)
    near:dict[str, Any] = dict(rtol=2e-2, atol=2e-2) if layout == 'AGFT' else {}
    torch.testing.assert_close(base.features(x), tuned.features(x), **near)
    torch.testing.assert_close(base.encode_text(TEXTS), text)
    with pytest.raises(AgftError, match='image encoder alone.*load_visual'):
        load_model('agft-test-quickgelu', path)


def test_learned_inputs_of_agfts_public_code(tmp_path):
    base, plain = make_model('agft-test-quickgelu'), make_model('agft-test-quickgelu')
    image = .1*torch.randn(1, 3, 32, 32, generator=seeded('i'))
    token = torch.randn(1, 4, 64, generator=seeded('t'))
    torch.save(dict(modules={}, params=dict(image_prompt=image, token_prompt=token.half())), tmp_path/'c.pth')
    load_visual(base, tmp_path/'c.pth')
    v, x = plain.model.visual, make_images(base)
    h = v.conv1((x - base.mean)/base.std + image).flatten(2).transpose(1, 2)
    h = torch.cat([v.class_embedding.expand(2, 1, -1), h], 1) + v.positional_embedding
    h = v.transformer(v.ln_pre(torch.cat([h, token.half().float().expand(2, -1, -1)], 1)))
    torch.testing.assert_close(base.features(x), v.ln_post(h[:, 0]) @ v.proj)
    save_model(base, tmp_path/'m.safetensors')
    torch.testing.assert_close(load_model(tmp_path/'m.safetensors').features(x), base.features(x))


@pytest.mark.parametrize('kind, shape', [('pixels', (1, 3, 32, 32)), ('tokens', (1, 4, 64))])
def test_a_copy_has_learned_inputs_of_its_own(tmp_path, kind, shape):
    model = make_model('agft-test')
    x = make_images(model)
    plain = model.features(x)
    add_learned_input(model, kind, torch.randn(shape, generator=seeded(kind)))
    copied = copy_model(model)
    before = model.features(x)
    assert torch.equal(copied.features(x), before) and not torch.equal(before, plain)
    with torch.no_grad():
        copied.learned_inputs[kind] += 1
    assert torch.equal(model.features(x), before) and not torch.equal(copied.features(x), before)
    save_model(copied, tmp_path/'m.safetensors')
    for filled in (model, make_model('agft-test', 1)):
        load_weights(filled, tmp_path/'m.safetensors')
        assert torch.equal(filled.features(x), copied.features(x))
        assert fingerprint(filled) == fingerprint(copied)


class Bomb:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def test_a_file_that_runs_code_is_refused_and_not_run(tmp_path):
    torch.save(dict(state_dict=Bomb(tmp_path/'ran')), tmp_path/'m.pt')
    with pytest.raises(AgftError, match='never run'):
        load_model('agft-test', tmp_path/'m.pt')
    with pytest.raises(AgftError, match='never run'):
        load_visual(make_model('agft-test'), tmp_path/'m.pt')
    assert not (tmp_path/'ran').exists()


def test_what_does_not_fit_names_its_first_tensor(tmp_path):
    model = make_model('agft-test')
    state = model.visual.state_dict()
    for name, change, words in [
            ('less', lambda s: s.pop('class_embedding'), 'Missing key.*"class_embedding"'),
            ('more', lambda s: s.update(extra=torch.zeros(1)), 'Unexpected key.*"extra"'),
            ('wide', lambda s: s.update(proj=torch.zeros(64, 33)), 'size mismatch for proj')]:
        changed = dict(state)
        change(changed)
        torch.save(changed, tmp_path/f'{name}.pt')
        with pytest.raises(AgftError, match=words) as e:
            load_visual(model, tmp_path/f'{name}.pt')
        assert '\n' not in str(e.value) and name in str(e.value)
    state = {**model.model.state_dict(), 'ln_final.weight': torch.zeros(65)}
    torch.save(state, tmp_path/'whole.pt')
    mismatch = 'size mismatch for ln_final.weight'
    with pytest.raises(AgftError, match=mismatch):
        load_model('agft-test', tmp_path/'whole.pt')
    with pytest.raises(AgftError, match=mismatch):
        load_weights(model, tmp_path/'whole.pt')
    torch.save([1, 2], tmp_path/'list.pt')
    with pytest.raises(AgftError, match='list.pt'):
        load_model('agft-test', tmp_path/'list.pt')
    with pytest.raises(AgftError, match='list.pt'):
        load_weights(model, tmp_path/'list.pt')
    with pytest.raises(AgftError, match='none.pt'):
        load_visual(model, tmp_path/'none.pt')


def test_a_sigmoid_head_keeps_its_bias_and_its_pixels(tmp_path, monkeypatch):
    "The bias moves every logit alike; images are normalised as for the published weights."
    half = dict(mean=(.5,)*3, std=(.5,)*3)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, 'agft-test-sigmoid', dict(webli=half))
    torch.save(make_model('agft-test-sigmoid').model.state_dict(), tmp_path/'m.pt')
    model = load_model('agft-test-sigmoid', tmp_path/'m.pt')
    assert model.mean.unique().item() == model.std.unique().item() == .5 and model.logit_bias < -9
    x, head = make_images(model), model.encode_text(TEXTS)
    same_logits(model, model.model)
    scaled = model.logit_scale*model.cosines(x, head)
    torch.testing.assert_close(model.logits(x, head).softmax(1), scaled.softmax(1))
    path = tmp_path/'m.safetensors'
    save_model(model, path)
    theirs = open_clip.create_model_and_transforms('agft-test-sigmoid', pretrained=str(path))[0]
    same_logits(model, theirs)
    monkeypatch.delitem(open_clip.pretrained._PRETRAINED, 'agft-test-sigmoid')
    torch.testing.assert_close(load_model(path).logits(x, head), model.logits(x, head))


def make_flags(robust):
    "50 images: 40 correct clean, `robust` of them under attack."
    def first(k): return np.arange(50) < k
    return Flags(first(40), first(robust), first(0), np.zeros(50), np.zeros(50, np.int64), np.array(.1))


def save_results(path):
    "Results of two attacks on one task."
    records = []
    for attack, robust in (('pgd20', 20), ('apgd', 15)):
        records += summarise('robust', [{'things': make_flags(robust)}], attack, 'Linf', 4/255, None)
    about = dict(threats='pgd20, L∞, ε = 4/255 at 32 px', command='agft eval x', machine='a CPU', seconds=1.)
    Results.from_records(records, about=about).save(path)


@pytest.mark.parametrize('name', ['agft-tiny', 'agft-photo', 'agft-test-sigmoid'])
def test_a_folder_for_the_hub_is_read_by_open_clip(tmp_path, name):
    own = name.startswith('agft-test')
    if own:
        save_model(make_model(name), tmp_path/'m.safetensors', method='AGFT', eps='1/255')
    path = tmp_path/'m.safetensors' if own else asset(f'{name}.safetensors')
    save_results(tmp_path/'results.json')
    hub.export_folder(path, tmp_path/'out', repo_id='me/robust', licence='mit', base_model='you/base',
                      results=tmp_path/'results.json')
    ours = load_model(path)
    model, _, preprocess = open_clip.create_model_and_transforms(f'local-dir:{tmp_path/"out"}')
    same_logits(ours, model)
    assert isinstance(preprocess, Compose)
    assert preprocess.transforms[0].interpolation.value == 'bilinear'
    assert fingerprint(load_model(tmp_path/'out'/'open_clip_model.safetensors')) == fingerprint(ours)
    _, head, text = (tmp_path/'out'/'README.md').read_text(encoding='utf-8').split('---\n', 2)
    assert yaml.safe_load(head) == dict(
        library_name='agft' if name == 'agft-photo' else 'open_clip',
        pipeline_tag='zero-shot-image-classification', license='mit', base_model='you/base',
        tags=['clip', 'adversarial-robustness', 'agft'])
    for word in ('me/robust', '80.0', '30.0', 'L∞, ε = 4/255', '# robust'):
        assert word in text, word
    assert ('hf-hub:me/robust' in text) == (name != 'agft-photo')
    assert ('| eps' in text) == own


def test_what_the_hub_cannot_hold_is_refused(tmp_path):
    save_model(make_model('agft-test'), tmp_path/'m.safetensors')
    card = hub.model_card(tmp_path/'m.safetensors', repo_id='me/x', licence='mit')
    assert 'No numbers' in card and 'No evaluation' in card and 'base_model' not in card
    torch.save(dict(modules={}, params=dict(image_prompt=torch.zeros(1, 3, 32, 32))), tmp_path/'c.pth')
    prompted = load_visual(make_model('agft-test-quickgelu'), tmp_path/'c.pth')
    save_model(prompted, tmp_path/'p.safetensors')
    with pytest.raises(AgftError, match='pixels'):
        hub.export_folder(tmp_path/'p.safetensors', tmp_path/'out', repo_id='me/x', licence='mit')
    assert not (tmp_path/'out').exists()
    write_json(tmp_path/'demo.json', dict(CLIP={}, about=dict(command='agft demo')))
    with pytest.raises(AgftError, match='demo.json'):
        hub.model_card(tmp_path/'m.safetensors', repo_id='me/x', licence='mit', results=tmp_path/'demo.json')


def test_a_model_from_a_hub_is_tuned_and_comes_back_tuned(tmp_path):
    "open_clip ignores weights beside such a name; the checkpoint's must win."
    base = make_model('agft-test')
    base.resize = 'bicubic'
    save_model(base, tmp_path/'m.safetensors')
    hub.export_folder(tmp_path/'m.safetensors', tmp_path/'base', repo_id='me/x', licence='mit')
    model = load_model(f'local-dir:{tmp_path/"base"}')
    assert model.resize == 'bicubic'
    model.model.visual.proj += .1
    model.resize = 'bilinear'
    save_model(model, tmp_path/'tuned.safetensors')
    assert load_model(tmp_path/'tuned.safetensors').resize == 'bilinear'
    assert fingerprint(load_model(tmp_path/'tuned.safetensors')) == fingerprint(model)


def test_push_uploads_the_folder(tmp_path, monkeypatch):
    seen = []
    class Api:
        def __init__(self, token=None): seen.append(token)
        def create_repo(self, repo_id, **kw): seen.append((repo_id, kw))
        def upload_folder(self, repo_id, folder_path, **kw):
            seen.append((repo_id, sorted(kw['allow_patterns'])))
    monkeypatch.setattr(hub, 'HfApi', Api)
    save_model(make_model('agft-test'), tmp_path/'m.safetensors')
    folder = hub.export_folder(tmp_path/'m.safetensors', tmp_path/'out', repo_id='me/x', licence='mit')
    assert hub.push_to_hub(folder, 'me/x', token='t') == 'hf-hub:me/x'
    assert seen == ['t', ('me/x', dict(private=False, exist_ok=True)),
                    ('me/x', ['README.md', 'open_clip_config.json', 'open_clip_model.safetensors'])]


def four_images(size):
    "Four images and their names: photographs where their archive is, else noise."
    folder = archives_dir()
    if folder is None:
        noise = torch.randint(0, 256, (4, 3, size, size), generator=seeded('noise'), dtype=torch.uint8)
        return noise, tuple('abcd')
    z = np.load(folder/'imagenet_sample1k.npz')
    classes = read_json(folder/'imagenet_sample1k.json')['classes']
    blob, offsets = z['blob'], z['offsets']
    files = [blob[offsets[i]:offsets[i + 1]].tobytes() for i in range(4)]
    images = torch.stack([torch.tensor(decode(f, size)) for f in files])
    return images, tuple(str(classes[y]) for y in z['labels'][:4])


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:.*torch.jit')
@pytest.mark.parametrize('name', ['ViT-B-32-quickgelu', 'RN50x4-quickgelu'])
def test_full_size(tmp_path, name, capsys):
    "Random weights in every format of the published ones, and one AGFT step."
    torch.manual_seed(0)
    first = open_clip.create_model(name)
    state = {k: v.half().float() if v.is_floating_point() else v for k, v in first.state_dict().items()}
    first.load_state_dict(state)  # exact in either precision
    openai_file(state, tmp_path/'archive.pt', True)
    openai_file(state, tmp_path/'openai.pt', False)
    torch.save(dict(state_dict=state), tmp_path/'open_clip.pt')
    for file in ('archive.pt', 'openai.pt', 'open_clip.pt'):
        teacher = load_model(name, tmp_path/file)
        assert fingerprint(teacher.model) == fingerprint(first), file
        (tmp_path/file).unlink()
    save_model(teacher, tmp_path/'m.safetensors')
    again = open_clip.create_model_and_transforms(name, pretrained=str(tmp_path/'m.safetensors'))[0]
    same_logits(teacher, again)
    del first, again, state
    images, names = four_images(teacher.size[0])
    kind = 'photographs' if archives_dir() else 'noise'
    task = Task(kind, images, torch.arange(4), names, ('a photo of a {}',))
    with capsys.disabled():
        print(f'\n{name}: one AGFT step on 4 images: {task.name}, {task.resolution} px')
    student = load_model(tmp_path/'m.safetensors')
    student.visual.requires_grad_(True)
    before = fingerprint(teacher)
    models = Models(student, teacher, teacher.head(task.classes, task.templates))
    agft = method('AGFT', logit_scale=180., gamma=.4)
    loss, numbers = adversarial_loss(models, agft, task, AttackConfig(), TrainConfig(batch_size=4))(0)
    loss.backward()
    torch.optim.SGD(student.visual.parameters(), lr=1e-3).step()
    assert torch.isfinite(loss) and numbers['zero_grad'] < 1
    assert fingerprint(teacher) == before != fingerprint(student)


def test_one_string_names_architecture_weights_and_image_encoder(tmp_path):
    file, theirs = tmp_path/'m.safetensors', tmp_path/'theirs.pt'
    save_model(make_model('agft-test'), file)
    model = load_model(f'agft-test@{file}')
    assert fingerprint(model) == fingerprint(load_model('agft-test', file))
    torch.save({k: v + .1 for k, v in model.visual.state_dict().items()}, theirs)
    both = load_model(f'agft-test@{file}@{theirs}')
    assert torch.allclose(both.model.visual.proj, model.model.visual.proj + .1)
    assert torch.equal(both.model.text_projection, model.model.text_projection)


def test_bf16_encoder_keeps_gradients():
    model, x = make_model('agft-test'), torch.rand(2, 3, 32, 32, generator=seeded('x'))
    plain = model.encode_image(x)
    model.precision = 'bf16'
    x.requires_grad_()
    fast = model.encode_image(x)
    assert fast.dtype == torch.float32 and not torch.equal(fast, plain) and (fast*plain).sum(1).min() > .999
    fast[:, 0].sum().backward()
    assert (x.grad != 0).float().mean() > .9


def test_export_is_one_command(tmp_path, capsys):
    save_model(make_model('agft-test'), tmp_path/'m.safetensors', method='AGFT')
    line = ['export', str(tmp_path/'m.safetensors'), 'me/x', '--licence', 'mit', '--out', str(tmp_path/'out')]
    assert main([*line, '--format', 'onnx']) == 2 and not (tmp_path/'out').exists()
    assert 'transformers-vision' in capsys.readouterr().err
    assert main(line) == 0 and f'local-dir:{tmp_path/"out"}' in capsys.readouterr().out
    exported = load_model(f'local-dir:{tmp_path/"out"}')
    assert fingerprint(exported) == fingerprint(load_model(tmp_path/'m.safetensors'))
    assert main([*line[:1], str(tmp_path/'none.safetensors'), *line[2:]]) == 2


def test_weights_of_a_named_file_are_evaluated(tmp_path, capsys):
    save_model(load_model('agft-tiny'), tmp_path/'m.safetensors')
    line = f'eval agft-tiny@{tmp_path}/m.safetensors --tasks size --n 2 --threats fgsm --out {tmp_path}/out'
    assert main(line.split()) == 0 and 'zero-shot mean' in capsys.readouterr().out


def under(prefix, state): return {f'{prefix}{key}': value for key, value in state.items()}


WRAPPED = {
    '_orig_mod.': lambda s: under('_orig_mod.', s),
    'module._orig_mod.': lambda s: under('module._orig_mod.', s),
    'inner _orig_mod.': lambda s: {k.replace('visual.', 'visual._orig_mod.'): v for k, v in s.items()},
    'Lightning': lambda s: dict(state_dict=under('model.', s), epoch=1, optimizer_states=[{}], callbacks={}),
    'Lightning with a criterion': lambda s: dict(state_dict=under('net.clip.', s)
                                                 | {'criterion.logit_scale': torch.ones(())}),
    'model': lambda s: dict(model=s, epoch=3),
    'model_state_dict': lambda s: dict(model_state_dict=s, optimizer_state_dict=dict(state={0: {'m': 1}})),
    'average': lambda s: under('module.', s) | dict(n_averaged=torch.tensor(9)),
    'EMA with a decay': lambda s: dict(ema=s, decay=torch.tensor(.999)),
    'numbers beside': lambda s: s | dict(epoch=3, lr=.1)}


@pytest.mark.parametrize('layout', WRAPPED)
def test_wrapped_checkpoints_are_unwrapped(tmp_path, layout):
    model, file = make_model('agft-test'), tmp_path/'m.pt'
    torch.save(WRAPPED[layout](model.model.state_dict()), file)
    assert fingerprint(load_model('agft-test', file)) == fingerprint(model)
    assert fingerprint(load_weights(make_model('agft-test', 1), file)) == fingerprint(model)
    torch.save(WRAPPED[layout](model.visual.state_dict()), file)
    base = load_visual(make_model('agft-test', 1), file)
    assert fingerprint(base.visual) == fingerprint(model.visual)


@pytest.mark.parametrize('content, words', [
    (lambda s: dict(model=s, model_ema=s), "several models, 'model', 'model_ema'"),
    (lambda s: under('online_model.', s) | under('ema_model.', s), "'online_model.', 'ema_model.'"),
    (lambda s: s | under('_orig_mod.', s), 'equal names'),
    (lambda s: under('encoder.', {'a.weight': torch.ones(1)}), r'Missing key.*begin with encoder\. \(1\)'),
    (lambda s: {}, 'no tensors'), (lambda s: dict(epoch=3), 'no tensors'), (lambda s: [s], 'list'),
    (lambda s: torch.ones(3), 'Tensor')])
def test_what_is_ambiguous_shows_what_the_file_holds(tmp_path, content, words):
    model, file = make_model('agft-test'), tmp_path/'m.pt'
    torch.save(content(model.model.state_dict()), file)
    for load in (lambda: load_model('agft-test', file), lambda: load_weights(model, file)):
        with pytest.raises(AgftError, match=words) as e:
            load()
        assert 'm.pt' in str(e.value) and '\n' not in str(e.value)


def test_wrapped_openai_weights_still_need_quick_gelu(tmp_path):
    openai_file(make_model('agft-test-quickgelu').model.state_dict(), tmp_path/'m.pt', script=False)
    torch.save(dict(model=under('module.', torch.load(tmp_path/'m.pt'))), tmp_path/'w.pt')
    load_model('agft-test-quickgelu', tmp_path/'w.pt')
    with pytest.raises(AgftError, match='trained with quick-gelu'):
        load_model('agft-test', tmp_path/'w.pt')


def compiled_in_parallel(module):
    compiled:Any = torch.compile(module)
    return torch.nn.DataParallel(compiled)


@pytest.mark.parametrize('wrap', [torch.compile, torch.nn.DataParallel, compiled_in_parallel])
def test_a_wrapped_encoder_is_saved_under_plain_names(tmp_path, wrap):
    plain, wrapped = make_model('agft-test'), make_model('agft-test')
    wrapped.model.visual = wrap(wrapped.model.visual)
    save_model(wrapped, tmp_path/'m.safetensors')
    assert fingerprint(load_model(tmp_path/'m.safetensors')) == fingerprint(plain)
    save_model(make_model('agft-test', 1), tmp_path/'other.safetensors')
    load_weights(wrapped, tmp_path/'other.safetensors')
    save_model(wrapped, tmp_path/'again.safetensors')
    assert fingerprint(load_model(tmp_path/'again.safetensors')) == fingerprint(make_model('agft-test', 1))


def test_a_transposed_weight_is_saved(tmp_path):
    model = make_model('agft-test')
    proj = model.model.visual.proj
    proj.data = proj.data.T.contiguous().T
    assert not proj.is_contiguous()
    save_model(model, tmp_path/'m.safetensors')
    assert torch.equal(load_model(tmp_path/'m.safetensors').model.visual.proj, proj)


@pytest.mark.parametrize('value, dtype', [(float('nan'), torch.float32), (float('inf'), torch.float32),
                                          (1e6, torch.float16)])
def test_a_model_that_is_not_finite_is_not_saved(tmp_path, value, dtype):
    model, file = make_model('agft-test'), tmp_path/'m.safetensors'
    save_model(model, file)
    before = file.read_bytes()
    model.model.visual.proj[3, 4] = value
    with pytest.raises(NotFinite, match="1 of 2048 numbers of 'visual.proj' are not finite"):
        save_model(model, file, dtype)
    assert file.read_bytes() == before and [f.name for f in tmp_path.glob('*m.safe*')] == ['m.safetensors']


def tiny():
    "A model of a few numbers, so that every byte of its checkpoint can be tried."
    def texts(names): return torch.ones(len(names), 2)
    torch.manual_seed(0)
    images = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))
    return from_modules(images, texts, [.5]*3, [.25]*3, 8, logit_scale=20.)


def test_a_flipped_byte_of_a_checkpoint_is_refused(tmp_path):
    model, file, bad = tiny(), tmp_path/'m.safetensors', tmp_path/'bad.safetensors'
    save_model(model, file, method='AGFT', eps='4/255', inputs=dict(images='a'))
    content, whole, notes = file.read_bytes(), fingerprint(model), read_notes(file)
    assert len(content) < 3000
    accepted = 0
    for i in range(len(content)):
        bits = (1, 0x20, 0xff)[i % 3]
        bad.write_bytes(content[:i] + bytes([content[i] ^ bits]) + content[i + 1:])
        try:
            same = fingerprint(load_weights(tiny(), bad)) == whole and read_notes(bad) == notes
        except AgftError as e:
            assert 'bad.safetensors' in str(e) and '\n' not in str(e)
        else:
            accepted += 1
            assert same, (i, bits)
    assert accepted < 10  # white space between the header and the numbers


@pytest.mark.parametrize('cut', [0, 1, 7, 100, -1])
def test_a_truncated_checkpoint_is_refused(tmp_path, cut):
    file = tmp_path/'m.safetensors'
    save_model(make_model('agft-test'), file)
    file.write_bytes(file.read_bytes()[:cut])
    for load in (lambda: load_model(file), lambda: load_model('agft-test', file),
                 lambda: load_weights(make_model('agft-test'), file)):
        with pytest.raises(AgftError, match='m.safetensors') as e:
            load()
        assert '\n' not in str(e.value)


def test_files_without_a_digest_are_read(tmp_path):
    model, file = make_model('agft-test'), tmp_path/'m.safetensors'
    save_model(model, file, method='AGFT')
    with safe_open(file, 'pt') as f:
        notes = f.metadata()
    notes.pop('digest')
    save_file(load_file(file), file, metadata=notes)
    assert fingerprint(load_model(file)) == fingerprint(model)
    assert checkpoint_info(file)['method'] == 'AGFT' and 'digest' not in checkpoint_info(file)


def test_a_folder_for_the_hub_is_verified_too(tmp_path):
    save_model(make_model('agft-test'), tmp_path/'m.safetensors')
    folder = hub.export_folder(tmp_path/'m.safetensors', tmp_path/'out', 'me/x', 'mit')
    weights = folder/'open_clip_model.safetensors'
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(AgftError, match='open_clip_model.safetensors.*damaged'):
        load_model(f'local-dir:{folder}')
