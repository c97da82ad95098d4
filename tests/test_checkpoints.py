"Files of weights as other projects write them, each made here in its layout, and what agft writes for others."
import json, os

import numpy as np, open_clip, pytest, torch, yaml
from safetensors.torch import save_file

from agft import hub
from agft.cli import main
from agft.clip import check_gelu, fingerprint, load_clip, load_visual, new_clip, save_clip
from agft.core import AgftError, asset, read_json, seeded, write_json
from agft.data import Task, decode, packs_dir
from agft.methods import Models, method
from agft.train import adversarial_loss

TEXTS = ['a red circle', 'two hearts', 'a letter g']
SMALL = dict(embed_dim=32, vision_cfg=dict(image_size=32, patch_size=8, width=64, layers=2),
             text_cfg=dict(context_length=77, vocab_size=49408, width=64, heads=1, layers=2))
CONFIGS = {'agft-test': SMALL, 'agft-test-quickgelu': dict(SMALL, quick_gelu=True),
           'agft-test-sigmoid': dict(SMALL, init_logit_bias=-10, custom_text=True)}


@pytest.fixture(autouse=True)
def configs(tmp_path, monkeypatch):
    "Small architectures from JSON files of the user's."
    for k in ('_MODEL_CONFIGS', '_MODEL_CONFIG_PATHS'): monkeypatch.setattr(open_clip.factory, k, getattr(open_clip.factory, k).copy())
    (tmp_path/'configs').mkdir()
    for name, cfg in CONFIGS.items(): (tmp_path/'configs'/f'{name}.json').write_text(json.dumps(cfg))
    open_clip.add_model_config(tmp_path/'configs')


def made(name, seed=0):
    "A model of random weights, its scale and bias moved from where they start."
    torch.manual_seed(seed)
    model = new_clip(name)
    for p in model.parameters(): p += .02*torch.randn(p.shape)
    return model


def pictures(model, n=2): return torch.rand(n, 3, *model.size, generator=seeded('pictures'))


def open_logits(model, clip, x): return model.eval().get_logits((x - clip.mean)/clip.std, clip.tokenizer(TEXTS))[0]


def same_logits(clip, model):
    "Ours and open_clip's logits of one picture are the same numbers."
    x = pictures(clip)
    torch.testing.assert_close(clip.logits(x, clip.encode_text(TEXTS)), open_logits(model, clip, x), rtol=1e-5, atol=1e-5)


def openai_file(state, path, script):
    "A file as OpenAI publishes it: half-precision matrices, three numbers more; a TorchScript archive, or its state_dict."
    state = {k: v.half() if v.ndim > 1 and 'embedding.weight' not in k else v.half().float() if v.is_floating_point() else v for k, v in state.items()}
    state |= dict(input_resolution=torch.tensor(32), context_length=torch.tensor(77), vocab_size=torch.tensor(49408))
    if not script: torch.save(state, path); return
    root = torch.nn.Module()
    for k, v in state.items():
        at, (*parents, last) = root, k.split('.')
        for part in parents:
            if not hasattr(at, part): at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        at.register_buffer(last, v)
    torch.jit.script(root).save(str(path))


@pytest.mark.filterwarnings('ignore:.*torch.jit')
@pytest.mark.parametrize('script', [True, False], ids=['archive', 'state_dict'])
def test_openai_files_read_as_open_clips_own_reader_does(tmp_path, script):
    openai_file(made('agft-test-quickgelu').model.state_dict(), tmp_path/'m.pt', script)
    same_logits(load_clip('agft-test-quickgelu', tmp_path/'m.pt'), open_clip.load_openai_model(str(tmp_path/'m.pt'), 'fp32', 'cpu'))
    with pytest.raises(AgftError, match='trained with quick-gelu.*allowed: agft-test-quickgelu$'): load_clip('agft-test', tmp_path/'m.pt')


@pytest.mark.parametrize('file', ['m.pt', 'm.bin', 'm.safetensors'])
@pytest.mark.parametrize('name', ['agft-test', 'agft-test-sigmoid'])
def test_open_clip_files(tmp_path, name, file):
    model, path = made(name), tmp_path/file
    state = {k: v.contiguous() for k, v in model.model.state_dict().items()}
    if file == 'm.pt': torch.save(dict(epoch=3, name='x', state_dict={f'module.{k}': v for k, v in state.items()}, optimizer={}), path)
    else: (save_file if 'safe' in file else torch.save)(state, path)
    assert fingerprint(load_clip(name, path)) == fingerprint(model)


@pytest.mark.parametrize('act, name, other', [('quick_gelu', 'agft-test-quickgelu', 'agft-test'), ('gelu', 'agft-test', 'agft-test-quickgelu')])
def test_transformers_files_give_transformers_logits(tmp_path, act, name, other):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    tower = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1, hidden_act=act)
    theirs = transformers.CLIPModel(transformers.CLIPConfig(projection_dim=32, vision_config=dict(tower, image_size=32, patch_size=8),
        text_config=dict(tower, vocab_size=49408, max_position_embeddings=77, eos_token_id=49407))).eval()
    with torch.no_grad():
        for p in theirs.parameters(): p += .02*torch.randn(p.shape)
    theirs.save_pretrained(tmp_path)
    clip = load_clip(name, tmp_path/'model.safetensors')
    x = pictures(clip)
    logits = theirs(input_ids=clip.tokenizer(TEXTS), pixel_values=(x - clip.mean)/clip.std).logits_per_image
    torch.testing.assert_close(clip.logits(x, clip.encode_text(TEXTS)), logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(AgftError, match=f'quick-gelu.*allowed: {name}$'): load_clip(other, tmp_path/'model.safetensors')


@pytest.mark.parametrize('name, tag, right', [
    ('ViT-B-32', 'openai', 'ViT-B-32-quickgelu'), ('RN50x4', 'openai', 'RN50x4-quickgelu'), ('ViT-L-14', 'dfn2b', 'ViT-L-14-quickgelu'),
    ('ViT-B-32-quickgelu', 'laion2b_s34b_b79k', 'ViT-B-32')])
def test_tags_that_need_another_activation(name, tag, right):
    with pytest.raises(AgftError, match=f'allowed: {right}$'): load_clip(name, tag)
    check_gelu(right, tag, {}, {})


def test_a_tag_without_a_twin_is_believed(): check_gelu('roberta-ViT-B-32', 'laion2b_s12b_b32k', {}, {})


def wrapped(layout, visual):
    "An image encoder as each project saves it."
    if layout in ('TeCoA', 'TGA-ZSR'):  # the same: TGA-ZSR began as TeCoA's code; the accuracy is a NumPy number
        return dict(epoch=10, state_dict={}, add_prompter=dict(prompt=torch.zeros(1, 0, 768)), vision_encoder_state_dict=visual,
                    best_acc1=np.mean([51., 52.]), optimizer=dict(state={}, param_groups=[dict(lr=1e-5, params=[0])]))
    return {'RobustVLM': visual, 'AGFT': dict(modules={'clip.visual': {k: v.half() for k, v in visual.items()}}, params={})}[layout]


@pytest.mark.parametrize('layout', ['TeCoA', 'TGA-ZSR', 'RobustVLM', 'AGFT'])
def test_image_encoders_of_other_methods(tmp_path, layout):
    tuned, base = made('agft-test-quickgelu', 1), made('agft-test-quickgelu', 2)
    torch.save(wrapped(layout, tuned.model.visual.state_dict()), tmp_path/'c.pth.tar')
    x, text = pictures(base), base.encode_text(TEXTS)
    assert load_visual(base, tmp_path/'c.pth.tar') is base
    if layout != 'RobustVLM':
        with pytest.raises(AgftError, match='allowed: agft-test-quickgelu$'): load_visual(made('agft-test'), tmp_path/'c.pth.tar')
    torch.testing.assert_close(base.features(x), tuned.features(x), **dict(rtol=2e-2, atol=2e-2) if layout == 'AGFT' else {})
    torch.testing.assert_close(base.encode_text(TEXTS), text)
    with pytest.raises(AgftError, match='image encoder alone.*load_visual'): load_clip('agft-test-quickgelu', tmp_path/'c.pth.tar')


def test_learnt_inputs_of_agfts_public_code(tmp_path):
    base, plain = made('agft-test-quickgelu'), made('agft-test-quickgelu')
    image, token = .1*torch.randn(1, 3, 32, 32, generator=seeded('i')), torch.randn(1, 4, 64, generator=seeded('t'))
    torch.save(dict(modules={}, params=dict(image_prompt=image, token_prompt=token.half())), tmp_path/'c.pth')
    load_visual(base, tmp_path/'c.pth')
    v, x = plain.model.visual, pictures(base)
    h = v.conv1((x - base.mean)/base.std + image).flatten(2).transpose(1, 2)
    h = torch.cat([v.class_embedding.expand(2, 1, -1), h], 1) + v.positional_embedding
    h = v.transformer(v.ln_pre(torch.cat([h, token.half().float().expand(2, -1, -1)], 1)))
    torch.testing.assert_close(base.features(x), v.ln_post(h[:, 0]) @ v.proj)
    save_clip(base, tmp_path/'m.safetensors')
    torch.testing.assert_close(load_clip(tmp_path/'m.safetensors').features(x), base.features(x))


class Bomb:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def test_a_file_that_runs_code_is_refused_and_not_run(tmp_path):
    torch.save(dict(state_dict=Bomb(tmp_path/'ran')), tmp_path/'m.pt')
    with pytest.raises(AgftError, match='never run'): load_clip('agft-test', tmp_path/'m.pt')
    with pytest.raises(AgftError, match='never run'): load_visual(made('agft-test'), tmp_path/'m.pt')
    assert not (tmp_path/'ran').exists()


def test_what_does_not_fit_names_its_first_tensor(tmp_path):
    model = made('agft-test')
    state = model.model.visual.state_dict()
    for name, change, words in [('less', lambda s: s.pop('class_embedding'), 'Missing key.*"class_embedding"'),
                                ('more', lambda s: s.update(extra=torch.zeros(1)), 'Unexpected key.*"extra"'),
                                ('wide', lambda s: s.update(proj=torch.zeros(64, 33)), 'size mismatch for proj')]:
        changed = dict(state)
        change(changed)
        torch.save(changed, tmp_path/f'{name}.pt')
        with pytest.raises(AgftError, match=words) as e: load_visual(model, tmp_path/f'{name}.pt')
        assert '\n' not in str(e.value) and name in str(e.value)
    state = {**model.model.state_dict(), 'ln_final.weight': torch.zeros(65)}
    torch.save(state, tmp_path/'whole.pt')
    with pytest.raises(AgftError, match='size mismatch for ln_final.weight'): load_clip('agft-test', tmp_path/'whole.pt')
    torch.save([1, 2], tmp_path/'list.pt')
    with pytest.raises(AgftError, match='list.pt'): load_clip('agft-test', tmp_path/'list.pt')
    with pytest.raises(AgftError, match='none.pt'): load_visual(model, tmp_path/'none.pt')


def test_a_sigmoid_head_keeps_its_bias_and_its_pixels(tmp_path, monkeypatch):
    "The bias moves every logit alike; pictures are normalised as the architecture's published weights are, here and after a checkpoint."
    half = dict(mean=(.5,)*3, std=(.5,)*3)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, 'agft-test-sigmoid', dict(webli=half))
    torch.save(made('agft-test-sigmoid').model.state_dict(), tmp_path/'m.pt')
    clip = load_clip('agft-test-sigmoid', tmp_path/'m.pt')
    assert clip.mean.unique().item() == clip.std.unique().item() == .5 and clip.bias < -9
    x, head = pictures(clip), clip.encode_text(TEXTS)
    same_logits(clip, clip.model)
    torch.testing.assert_close(clip.logits(x, head).softmax(1), (clip.scale*clip.cosines(x, head)).softmax(1))
    save_clip(clip, tmp_path/'m.safetensors')
    same_logits(clip, open_clip.create_model_and_transforms('agft-test-sigmoid', pretrained=str(tmp_path/'m.safetensors'))[0])
    monkeypatch.delitem(open_clip.pretrained._PRETRAINED, 'agft-test-sigmoid')
    again = load_clip(tmp_path/'m.safetensors')
    torch.testing.assert_close(again.logits(x, head), clip.logits(x, head))


RESULTS = {label: {task: dict(clean=.8, robust=r, n=50, spread=dict(clean=None, robust=None)) for task in ('things', 'zero-shot mean')}
           for label, r in (('pgd20, ε = 4/255', .4), ('apgd, ε = 4/255', .3))} | dict(about=dict(threat='pgd20, L∞, ε = 4/255 at 32 px', command='agft eval x'))


@pytest.mark.parametrize('name', ['agft-tiny', 'agft-photo', 'agft-test-sigmoid'])
def test_a_folder_for_the_hub_is_read_by_open_clip(tmp_path, name):
    if name.startswith('agft-test'): save_clip(made(name), tmp_path/'m.safetensors', method='AGFT', eps='1/255')
    path = tmp_path/'m.safetensors' if name.startswith('agft-test') else asset(f'{name}.safetensors')
    write_json(tmp_path/'results.json', RESULTS)
    hub.export_folder(path, tmp_path/'out', repo_id='me/robust', licence='mit', base_model='you/base', results=tmp_path/'results.json')
    clip = load_clip(path)
    model, _, preprocess = open_clip.create_model_and_transforms(f'local-dir:{tmp_path/"out"}')
    same_logits(clip, model)
    assert preprocess.transforms[0].interpolation.value == 'bilinear'
    assert fingerprint(load_clip(tmp_path/'out'/'open_clip_model.safetensors')) == fingerprint(clip)
    _, head, text = (tmp_path/'out'/'README.md').read_text(encoding='utf-8').split('---\n', 2)
    assert yaml.safe_load(head) == dict(library_name='open_clip', pipeline_tag='zero-shot-image-classification', license='mit',
                                        base_model='you/base', tags=['clip', 'adversarial-robustness', 'agft'])
    for word in ('hf-hub:me/robust', '80.0', '30.0', 'L∞, ε = 4/255', '# robust'): assert word in text, word
    assert ('agft.clip.load_clip' in text) == (name in ('agft-tiny', 'agft-photo')) and ('| eps' in text) == name.startswith('agft-test')


def test_what_the_hub_cannot_hold_is_refused(tmp_path):
    save_clip(made('agft-test'), tmp_path/'m.safetensors')
    card = hub.model_card(tmp_path/'m.safetensors', repo_id='me/x', licence='mit')
    assert 'No numbers' in card and 'No evaluation' in card and 'base_model' not in card
    torch.save(dict(modules={}, params=dict(image_prompt=torch.zeros(1, 3, 32, 32))), tmp_path/'c.pth')
    save_clip(load_visual(made('agft-test-quickgelu'), tmp_path/'c.pth'), tmp_path/'p.safetensors')
    with pytest.raises(AgftError, match='pixels'): hub.export_folder(tmp_path/'p.safetensors', tmp_path/'out', repo_id='me/x', licence='mit')
    assert not (tmp_path/'out').exists()
    write_json(tmp_path/'demo.json', dict(CLIP={}, about=dict(command='agft demo')))
    with pytest.raises(AgftError, match='demo.json'): hub.model_card(tmp_path/'m.safetensors', repo_id='me/x', licence='mit', results=tmp_path/'demo.json')


def test_a_model_from_a_hub_is_tuned_and_comes_back_tuned(tmp_path):
    "open_clip ignores weights beside such a name; the checkpoint's must win."
    save_clip(made('agft-test'), tmp_path/'m.safetensors')
    hub.export_folder(tmp_path/'m.safetensors', tmp_path/'base', repo_id='me/x', licence='mit')
    model = load_clip(f'local-dir:{tmp_path/"base"}')
    model.model.visual.proj += .1
    save_clip(model, tmp_path/'tuned.safetensors')
    assert fingerprint(load_clip(tmp_path/'tuned.safetensors')) == fingerprint(model)


def test_push_uploads_the_folder(tmp_path, monkeypatch):
    seen = []
    class Api:
        def __init__(self, token=None): seen.append(token)
        def create_repo(self, repo_id, **kw): seen.append((repo_id, kw))
        def upload_folder(self, repo_id, folder_path, **kw): seen.append((repo_id, sorted(os.listdir(folder_path))))
    monkeypatch.setattr(hub, 'HfApi', Api)
    save_clip(made('agft-test'), tmp_path/'m.safetensors')
    folder = hub.export_folder(tmp_path/'m.safetensors', tmp_path/'out', repo_id='me/x', licence='mit')
    assert hub.push_to_hub(folder, 'me/x', token='t') == 'hf-hub:me/x'
    assert seen == ['t', ('me/x', dict(private=False, exist_ok=True)),
                    ('me/x', ['README.md', 'open_clip_config.json', 'open_clip_model.safetensors'])]


def four(size):
    "Four pictures and their names: photographs where the pack is, else noise."
    if packs_dir() is None: return torch.randint(0, 256, (4, 3, size, size), generator=seeded('noise'), dtype=torch.uint8), tuple('abcd')
    z, classes = np.load(packs_dir()/'imagenet_sample1k.npz'), read_json(packs_dir()/'imagenet_sample1k.json')['classes']
    blob, offsets = z['blob'], z['offsets']
    files = [blob[offsets[i]:offsets[i + 1]].tobytes() for i in range(4)]
    return torch.stack([torch.tensor(decode(f, size)) for f in files]), tuple(str(classes[y]) for y in z['labels'][:4])


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:.*torch.jit')
@pytest.mark.parametrize('name', ['ViT-B-32-quickgelu', 'RN50x4-quickgelu'])
def test_full_size(tmp_path, name, capsys):
    "Random weights in every format of the real ones, and one AGFT step."
    torch.manual_seed(0)
    first = open_clip.create_model(name)
    state = {k: v.half().float() if v.is_floating_point() else v for k, v in first.state_dict().items()}     # exact in either precision
    first.load_state_dict(state)
    openai_file(state, tmp_path/'archive.pt', True)
    openai_file(state, tmp_path/'openai.pt', False)
    torch.save(dict(state_dict=state), tmp_path/'open_clip.pt')
    for file in ('archive.pt', 'openai.pt', 'open_clip.pt'):
        clip = load_clip(name, tmp_path/file)
        assert fingerprint(clip.model) == fingerprint(first), file
        (tmp_path/file).unlink()
    save_clip(clip, tmp_path/'m.safetensors')
    again = open_clip.create_model_and_transforms(name, pretrained=str(tmp_path/'m.safetensors'))[0]
    same_logits(clip, again)
    del first, again, state
    images, names = four(clip.size[0])
    task = Task('photographs' if packs_dir() else 'noise', images, torch.arange(4), names, ('a photo of a {}',))
    with capsys.disabled(): print(f'\n{name}: one AGFT step on 4 pictures: {task.name}, {task.resolution} px')
    student = load_clip(tmp_path/'m.safetensors')
    student.model.visual.requires_grad_(True)
    before = fingerprint(clip)
    loss, numbers = adversarial_loss(Models(student, clip, clip.head(task.classes, task.templates)), method('AGFT', scale=180., gamma=.4), task, batch_size=4)(0)
    loss.backward()
    torch.optim.SGD(student.model.visual.parameters(), lr=1e-3).step()
    assert torch.isfinite(loss) and numbers['zero_grad'] < 1 and fingerprint(clip) == before != fingerprint(student)


def test_one_string_names_architecture_weights_and_image_encoder(tmp_path):
    save_clip(made('agft-test'), tmp_path/'m.safetensors')
    model = load_clip(f'agft-test@{tmp_path/"m.safetensors"}')
    assert fingerprint(model) == fingerprint(load_clip('agft-test', tmp_path/'m.safetensors'))
    torch.save({k: v + .1 for k, v in model.model.visual.state_dict().items()}, tmp_path/'theirs.pt')
    both = load_clip(f'agft-test@{tmp_path/"m.safetensors"}@{tmp_path/"theirs.pt"}')
    assert torch.allclose(both.model.visual.proj, model.model.visual.proj + .1) and torch.equal(both.model.text_projection, model.model.text_projection)


def test_bf16_encoder_keeps_gradients(tmp_path):
    model, x = made('agft-test'), torch.rand(2, 3, 32, 32, generator=seeded('x'))
    plain = model.encode_image(x)
    model.precision = 'bf16'
    x.requires_grad_()
    fast = model.encode_image(x)
    assert fast.dtype == torch.float32 and not torch.equal(fast, plain) and (fast*plain).sum(1).min() > .999
    fast[:, 0].sum().backward()
    assert (x.grad != 0).float().mean() > .9


def test_export_is_one_command(tmp_path, capsys):
    save_clip(made('agft-test'), tmp_path/'m.safetensors', method='AGFT')
    line = ['export', str(tmp_path/'m.safetensors'), 'me/x', '--licence', 'mit', '--out', str(tmp_path/'out')]
    assert main(line) == 0 and f'local-dir:{tmp_path/"out"}' in capsys.readouterr().out
    assert fingerprint(load_clip(f'local-dir:{tmp_path/"out"}')) == fingerprint(load_clip(tmp_path/'m.safetensors'))
    assert main([*line[:1], str(tmp_path/'none.safetensors'), *line[2:]]) == 2


def test_weights_of_a_named_file_are_evaluated(tmp_path, capsys):
    save_clip(load_clip('agft-tiny'), tmp_path/'m.safetensors')
    line = f'eval agft-tiny@{tmp_path/"m.safetensors"} --tasks size --n 2 --threats fgsm --out {tmp_path/"out"}'
    assert main(line.split()) == 0 and 'mean of all' in capsys.readouterr().out
