"Settings of the pre-training, and models that are shared: a card and a folder that open_clip loads."
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import open_clip
import pytest
import torch
import yaml
from torchvision.transforms import Compose

from agft import hub
from agft.cli import _COMMANDS
from agft.config import PretrainConfig, Recipe, build, load_preset, override
from agft.core import AgftError, read_json, seeded, write_json
from agft.evaluation import Flags
from agft.model import add_learned_input, fingerprint
from agft.pretrain import _Drawings, pretrain
from agft.results import Results, summarise
from agft.train import Reader, finetune
from agft.weights import load_model, new_model, save_model

TEXTS = ['a red circle', 'two hearts', 'a letter g']
SMALL = {'embed_dim': 32, 'vision_cfg': {'image_size': 32, 'patch_size': 8, 'width': 64, 'layers': 2},
         'text_cfg': {'context_length': 77, 'vocab_size': 49408, 'width': 64, 'heads': 1, 'layers': 2}}


@pytest.mark.parametrize('settings, words', [
    ({'text': {'batchsize': 2}}, 'text.batchsize.*batch_size'),
    ({'text': {'steps': 0}}, 'text.steps'),
    ({'image': {'lr': '0.1'}}, 'image.lr'),
    ({'image': {'optimizer': 'adam'}}, 'image.optimizer.*adamw'),
    ({'image': {'warmup': 1.}}, 'image.warmup'),
    ({'rho': 1.5}, 'rho is 1.5'),
    ({'sizes': [32, 0]}, 'sizes'),
    ({'scale': 50.}, 'unknown key scale'),
    ({'packs': 'cifar10'}, 'packs'),
])
def test_settings_of_the_pretraining_are_strict(settings, words):
    with pytest.raises(AgftError, match=words) as e:
        build(PretrainConfig, settings)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('preset', ['tiny', 'photo'])
def test_presets_hold_the_settings_that_made_the_shipped_models(preset):
    "AdamW, and a gradient norm of at most 1."
    config = load_preset(preset).pretrain
    assert config is not None
    for stage in (config.text, config.image):
        assert (stage.optimizer, stage.betas, stage.grad_clip) == ('adamw', (.9, .98), 1.)


def test_pretrain_refuses_what_it_cannot_do(tmp_path, monkeypatch):
    monkeypatch.setenv('AGFT_DATA', str(tmp_path))
    out, photo = tmp_path/'out', load_preset('photo')
    for recipe, words in [(override(photo, **{'model.name': 'ViT-B-32'}), 'ViT-B-32.*agft-tiny.*agft-photo'),
                          (build(Recipe, {}), 'agft-tiny has no .*pretrain'),
                          (photo, 'clip_text_vitb32.*AGFT_DATA')]:
        with pytest.raises(AgftError, match=words):
            pretrain(recipe, out, device='cpu')
    assert not out.exists()


SHORT = {f'pretrain.{part}.{key}': 2 if key == 'steps' else 16
         for part in ('text', 'image') for key in ('steps', 'batch_size')}


def test_pretrain_records_its_settings_and_continues(tmp_path, capsys):
    recipe, out = override(load_preset('tiny'), **SHORT), tmp_path/'out'
    model = pretrain(recipe, out, seed=3, device='cpu')
    run, about = read_json(out/'run.json'), read_json(out/'pretrain.json')
    assert build(PretrainConfig, run['config']) == recipe.pretrain
    assert (run['command'], run['model'], run['seed']) == ('pretrain', 'agft-tiny', 3)
    assert about['text']['steps'] == about['image']['steps'] == 2
    saved = load_model(out/'agft-tiny.safetensors')
    before = fingerprint(saved)
    x = torch.rand(2, 3, 32, 32, generator=seeded('x'))
    half = {'atol': 5e-3, 'rtol': 0}  # the file is in half precision
    torch.testing.assert_close(saved.encode_image(x), model.encode_image(x), **half)
    pretrain(recipe, out, seed=3, device='cpu')
    assert fingerprint(load_model(out/'agft-tiny.safetensors')) == before
    with pytest.raises(AgftError, match='seed'):
        pretrain(recipe, out, seed=4, device='cpu')
    assert str(out/'agft-tiny.safetensors') in capsys.readouterr().out


def tokenizer_of(source):
    tokenizer = load_model(source).tokenizer
    assert tokenizer is not None
    return tokenizer


def test_the_small_vision_transformer_is_trained_and_tuned_by_attention_maps(tmp_path):
    recipe = override(load_preset('tiny_vit'), **SHORT)
    pretrain(recipe, tmp_path/'vit', device='cpu')
    source = str(tmp_path/'vit'/'agft-tiny-vit.safetensors')
    assert torch.equal(tokenizer_of(source)(TEXTS), tokenizer_of('agft-tiny')(TEXTS))
    few = {'model.name': source, 'train.images': 8, 'train.steps': 1, 'train.batch_size': 4}
    student = finetune(override(recipe.finetune('TGA-ZSR'), **few), tmp_path/'run', 'cpu')
    assert student.name == 'agft-tiny-vit' and fingerprint(student) != fingerprint(load_model(source))


def test_images_are_the_same_whoever_draws_them():
    drawings = _Drawings(tokenizer_of('agft-tiny'), 16, 0)
    read = Reader(drawings, 2, torch.device('cpu'))
    for step in (0, 1, 5):
        ours, theirs = drawings[step], read(step)
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.tokens, theirs.tokens)
        for (one, first), (other, place) in zip(ours.groups, theirs.groups, strict=True):
            assert torch.equal(one.images, other.images) and torch.equal(one.group, other.group)
            assert first == place
    assert not torch.equal(drawings[0].images, drawings[1].images)


def random_model(name):
    "A model with random weights and biases."
    torch.manual_seed(0)
    model = new_model(name)
    for p in model.parameters():
        p += .02*torch.randn(p.shape)
    return model


@pytest.fixture
def checkpoint(tmp_path, architectures):
    "A small random model, in an architecture from a JSON file, as a checkpoint of a fine-tuning run."
    architectures({'agft-test': SMALL})
    model = random_model('agft-test')
    notes:dict[str, Any] = {'method': 'AGFT', 'source': 'things', 'attack.eps': '1/255'}
    save_model(model, tmp_path/'m.safetensors', **notes)
    return tmp_path/'m.safetensors'


def flags(robust):
    "50 images: 40 correct clean, `robust` of them under attack."
    def first(k): return np.arange(50) < k
    return Flags(first(40), first(robust), first(0), np.zeros(50), np.zeros(50, np.int64), np.array(.1))


def save_results(path, command):
    "Results of two attacks on one task."
    records = []
    for attack, robust in (('pgd20', 20), ('apgd', 15)):
        run = {'things': flags(robust)}
        records += summarise('robust', [run], attack, 'Linf', 4/255, None)
    about = {'command': command, 'threats': 'pgd20, L∞, ε = 4/255 at 32 px', 'seconds': 1.}
    Results.from_records(records, about=about).save(path)
    return path


def same_logits(ours, theirs):
    "Our logits and open_clip's of two images are equal."
    x = torch.rand(2, 3, *ours.size, generator=seeded('images'))
    logits = theirs.eval().get_logits((x - ours.mean)/ours.std, ours.tokenizer(TEXTS))[0]
    torch.testing.assert_close(ours.logits(x, ours.encode_text(TEXTS)), logits, rtol=1e-5, atol=1e-5)


def test_a_folder_holds_the_model_and_its_card(tmp_path, checkpoint):
    results = save_results(tmp_path/'results.json', 'agft eval m.safetensors')
    hub.export_folder(checkpoint, tmp_path/'out', repo_id='me/robust', licence='mit', base_model='you/base',
                      results=results)
    model = load_model(checkpoint)
    theirs, _, preprocess = open_clip.create_model_and_transforms(f'local-dir:{tmp_path/"out"}')
    same_logits(model, theirs)
    assert isinstance(preprocess, Compose)
    assert preprocess.transforms[0].interpolation.value == 'bilinear'
    assert fingerprint(load_model(tmp_path/'out'/'open_clip_model.safetensors')) == fingerprint(model)
    _, head, text = (tmp_path/'out'/'README.md').read_text(encoding='utf-8').split('---\n', 2)
    assert yaml.safe_load(head) == {
        'library_name': 'open_clip', 'pipeline_tag': 'zero-shot-image-classification', 'license': 'mit',
        'base_model': 'you/base', 'tags': ['clip', 'adversarial-robustness', 'agft']}
    for word in ('# robust', 'hf-hub:me/robust', 'fine-tuned by AGFT', '80.0', '40.0', '30.0', 'pgd20 4/255',
                 'L∞, ε = 4/255 at 32 px', 'agft eval m.safetensors', '| attack.eps', '"1/255"'):
        assert word in text, word
    assert 'tokenizer.json' not in text and not (tmp_path/'out'/'tokenizer.json').exists()


def test_a_card_without_results_claims_nothing(checkpoint):
    card = hub.model_card(checkpoint, repo_id='me/x', licence='mit')
    assert 'No numbers' in card and 'No evaluation' in card and 'base_model' not in card


def read_without_agft(library, folder, tmp_path, model):
    "What a library makes of a folder in a process that cannot import agft; the images and texts that it got."
    pytest.importorskip('transformers')
    images = torch.randint(0, 256, (2, 3, *model.size), generator=seeded('images'), dtype=torch.uint8)
    torch.save({'images': images, 'texts': TEXTS}, tmp_path/'inputs.pt')
    script = Path(__file__).with_name('without_agft.py')
    files = [str(path) for path in (folder, tmp_path/'inputs.pt', tmp_path/'results.pt')]
    subprocess.run([sys.executable, str(script), library, *files], check=True, cwd=tmp_path,
                   env={**os.environ, 'HF_HUB_OFFLINE': '1'})
    return torch.load(tmp_path/'results.pt'), images/255


def as_ours(model, logits, x):
    "The logits of another library are those of the model."
    torch.testing.assert_close(logits, model.logits(x, model.encode_text(TEXTS)), rtol=1e-5, atol=1e-5)


def test_open_clip_reads_a_small_model_without_agft(tmp_path):
    "The vocabulary is in the folder: open_clip's own has ids up to 49,407 for 851 rows."
    model = load_model('agft-tiny')
    save_model(model, tmp_path/'m.safetensors')
    folder = hub.export_folder(tmp_path/'m.safetensors', tmp_path/'out', 'me/x', 'mit')
    assert read_json(folder/'open_clip_config.json')['model_cfg']['text_cfg']['hf_tokenizer_name'] == 'me/x'
    assert 'tokenizer.json, which open_clip reads with transformers' in (folder/'README.md').read_text()
    (tokens, logits), x = read_without_agft('open_clip', folder, tmp_path, model)
    assert tokens.shape == (3, 24) and tokens.max() == 850
    as_ours(model, logits, x)


def test_a_model_from_an_exported_folder_is_exported_again(tmp_path):
    save_model(load_model('agft-tiny'), tmp_path/'m.safetensors')
    first = hub.export_folder(tmp_path/'m.safetensors', tmp_path/'first', 'me/x', 'mit')
    model = load_model(f'local-dir:{first}')
    model.model.visual.attnpool.c_proj.weight.data *= 1.1
    save_model(model, tmp_path/'tuned.safetensors')
    again = hub.export_folder(tmp_path/'tuned.safetensors', tmp_path/'again', 'me/tuned', 'mit')
    source, x = f'local-dir:{again}', torch.rand(2, 3, *model.size, generator=seeded('images'))
    tokens = open_clip.get_tokenizer(source)(TEXTS)
    theirs:Any = open_clip.create_model(source).eval()
    logits = theirs.get_logits((x - model.mean)/model.std, tokens)[0]
    assert tokens.max() == 850
    as_ours(load_model(tmp_path/'tuned.safetensors'), logits, x)


@pytest.fixture
def transformer(tmp_path, architectures, request):
    "A small random vision transformer with its own normalisation; the parameter: whether with quick-gelu."
    architectures({'agft-test': SMALL | {'quick_gelu': request.param}})
    model = random_model('agft-test')
    model.mean += .1
    model.std *= .9
    save_model(model, tmp_path/'m.safetensors')
    return load_model(tmp_path/'m.safetensors')


@pytest.mark.parametrize('transformer', [True, False], indirect=True)
def test_transformers_reads_a_model_without_agft(tmp_path, transformer):
    folder = hub.export_folder(tmp_path/'m.safetensors', tmp_path/'out', 'me/x', 'mit', format='transformers')
    (tokens, logits), x = read_without_agft('transformers', folder, tmp_path, transformer)
    assert tokens.max() == 49407
    as_ours(transformer, logits, x)
    again = load_model('agft-test', folder/'model.safetensors')  # under open_clip's names
    assert fingerprint(again.model) == fingerprint(transformer.model)
    head = yaml.safe_load((folder/'README.md').read_text(encoding='utf-8').split('---\n')[1])
    assert head['library_name'] == 'transformers'


@pytest.mark.parametrize('transformer', [True], indirect=True)
def test_transformers_reads_an_image_encoder_without_agft(tmp_path, transformer):
    "With its projection, and without it, as LLaVA does."
    folder = hub.export_folder(tmp_path/'m.safetensors', tmp_path/'out', 'me/x', 'mit',
                               format='transformers-vision')
    assert not (folder/'tokenizer.json').exists()
    (projected, pooled), x = read_without_agft('vision', folder, tmp_path, transformer)
    features, proj = transformer.features(x), transformer.model.visual.proj
    torch.testing.assert_close(projected, features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled @ proj, features, rtol=1e-5, atol=1e-5)


def test_transformers_resizes_as_far_as_it_can(tmp_path, checkpoint):
    model = load_model(checkpoint, resize='bicubic-plain')
    save_model(model, tmp_path/'cubic.safetensors')
    for name, resample in (('m', 2), ('cubic', 3)):
        file = tmp_path/f'{name}.safetensors'
        folder = hub.export_folder(file, tmp_path/name, 'me/x', 'mit', format='transformers-vision')
        rule = read_json(folder/'preprocessor_config.json')
        assert (rule['resample'], rule['size']) == (resample, {'shortest_edge': 32})
        assert rule['crop_size'] == {'height': 32, 'width': 32}
    folder = hub.export_folder(tmp_path/'cubic.safetensors', tmp_path/'open', 'me/x', 'mit')
    preprocess = open_clip.create_model_and_transforms(f'local-dir:{folder}')[2]
    assert isinstance(preprocess, Compose) and preprocess.transforms[0].interpolation.value == 'bicubic'


@pytest.mark.parametrize('change, format, words', [
    ({'vision_cfg': {'layers': [1, 1, 1, 1], 'width': 16, 'image_size': 64}}, 'transformers-vision',
     r"image encoder.*layers=\[1, 1, 1, 1\].*ViT-B-32.*--format open_clip"),
    ({'vision_cfg': SMALL['vision_cfg'] | {'no_ln_pre': True}}, 'transformers',
     'image encoder.*no_ln_pre=True'),
    ({'vision_cfg': SMALL['vision_cfg'] | {'image_size': [32, 64]}}, 'transformers',
     r'image encoder.*image_size=\(32, 64\)'),
    ({'text_cfg': SMALL['text_cfg'] | {'no_causal_mask': True}}, 'transformers',
     'text encoder.*no_causal_mask=True.*transformers-vision'),
    ({'init_logit_bias': -10}, 'transformers', 'init_logit_bias=-10'),
])
def test_what_transformers_cannot_hold_is_refused(tmp_path, architectures, change, format, words):
    architectures({'agft-test': SMALL | change})
    save_model(new_model('agft-test'), tmp_path/'m.safetensors')
    with pytest.raises(AgftError, match=words) as e:
        hub.export_folder(tmp_path/'m.safetensors', tmp_path/'out', 'me/x', 'mit', format=format)
    assert '\n' not in str(e.value) and not (tmp_path/'out').exists()


def test_an_image_encoder_does_not_need_the_text_encoder(tmp_path, architectures):
    change = {'text_cfg': SMALL['text_cfg'] | {'no_causal_mask': True}}
    architectures({'agft-test': SMALL | change})
    save_model(new_model('agft-test'), tmp_path/'m.safetensors')
    folder = hub.export_folder(tmp_path/'m.safetensors', tmp_path/'out', 'me/x', 'mit',
                               format='transformers-vision')
    assert read_json(folder/'config.json')['architectures'] == ['CLIPVisionModelWithProjection']


def test_a_model_that_needs_agft_says_so(tmp_path, capsys):
    "timm has no agft_resnet: printed before anything is written, and on the card."
    save_model(load_model('agft-photo'), tmp_path/'m.safetensors')
    folder = hub.export(tmp_path/'m.safetensors', 'me/x', 'mit', tmp_path/'out')
    printed = capsys.readouterr().out
    file = folder/'open_clip_model.safetensors'
    assert 'open_clip alone cannot load' in printed and f"agft.load_model('{file}')" in printed
    assert 'open_clip loads it as' not in printed
    card = (folder/'README.md').read_text(encoding='utf-8')
    assert 'library_name: agft' in card and 'agft.load_model(' in card
    assert 'open_clip.create_model' not in card
    assert fingerprint(load_model(file)) == fingerprint(load_model('agft-photo'))


def test_the_command_line_knows_all_formats():
    assert get_args(get_type_hints(_COMMANDS['export'])['format']) == tuple(hub.FORMATS)


def test_a_folder_holds_one_format(tmp_path, checkpoint):
    folder = hub.export_folder(checkpoint, tmp_path/'out', 'me/x', 'mit')
    before = listing(folder)
    with pytest.raises(AgftError, match='open_clip_model.safetensors of another export'):
        hub.export_folder(checkpoint, folder, 'me/x', 'mit', format='transformers')
    with pytest.raises(AgftError, match='unknown format.*onnx.*transformers-vision'):
        hub.export(checkpoint, 'me/x', 'mit', folder, format='onnx')
    assert listing(folder) == before


def test_only_results_of_an_evaluation_are_taken(tmp_path, checkpoint):
    other = save_results(tmp_path/'demo.json', 'agft demo')
    with pytest.raises(AgftError, match='demo.json is not'):
        hub.model_card(checkpoint, 'me/x', 'mit', results=other)
    write_json(tmp_path/'old.json', {'CLIP': {}, 'about': {'command': 'agft eval'}})
    with pytest.raises(AgftError, match='old.json'):
        hub.export_folder(checkpoint, tmp_path/'out', 'me/x', 'mit', results=tmp_path/'old.json')
    assert not (tmp_path/'out').exists()


def test_a_learned_input_is_refused(tmp_path, checkpoint):
    model = load_model(checkpoint)
    add_learned_input(model, 'pixels', torch.zeros(1, 3, 32, 32))
    save_model(model, tmp_path/'p.safetensors')
    with pytest.raises(AgftError, match='learned input.*pixels'):
        hub.export_folder(tmp_path/'p.safetensors', tmp_path/'out', repo_id='me/x', licence='mit')
    assert not (tmp_path/'out').exists()


def test_push_uploads_the_folder(tmp_path, monkeypatch, checkpoint):
    calls = []
    class Api:
        def __init__(self, token=None): calls.append(token)
        def create_repo(self, repo_id, **options): calls.append((repo_id, options))
        def upload_folder(self, repo_id, folder_path, **options):
            calls.append((repo_id, sorted(os.listdir(folder_path))[1:], options['allow_patterns']))
    monkeypatch.setattr(hub, 'HfApi', Api)
    folder = hub.export_folder(checkpoint, tmp_path/'out', repo_id='me/x', licence='mit')
    assert hub.push_to_hub(folder, 'me/x', token='t') == 'hf-hub:me/x'
    files = ['README.md', 'open_clip_config.json', 'open_clip_model.safetensors']
    assert calls == ['t', ('me/x', {'private': False, 'exist_ok': True}), ('me/x', files, files)]


def test_push_uploads_the_files_of_transformers(tmp_path, monkeypatch, checkpoint):
    calls = []
    class Api:
        def __init__(self, token=None): pass
        def create_repo(self, repo_id, **options): pass
        def upload_folder(self, folder_path, allow_patterns, **_): calls.append(allow_patterns)
    monkeypatch.setattr(hub, 'HfApi', Api)
    hub.export(checkpoint, 'me/x', 'mit', tmp_path/'out', push=True, format='transformers')
    assert calls == [['README.md', 'config.json', 'model.safetensors', 'preprocessor_config.json',
                      'tokenizer.json', 'tokenizer_config.json']]


def test_export_is_one_command(tmp_path, checkpoint, capsys):
    hub.export(checkpoint, 'me/x', 'mit', tmp_path/'out')
    name = f'local-dir:{tmp_path/"out"}'
    assert name in capsys.readouterr().out
    assert fingerprint(load_model(name)) == fingerprint(load_model(checkpoint))


def listing(folder):
    "The content of every file of a folder."
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize('name', ['README.md', 'open_clip_config.json', 'open_clip_model.safetensors'])
def test_files_of_the_user_are_not_replaced(tmp_path, checkpoint, name):
    folder = tmp_path/'out'
    folder.mkdir()
    (folder/name).write_text('six weeks of notes')
    before = listing(folder)
    with pytest.raises(AgftError, match=f'{name}.*not replaced'):
        hub.export_folder(checkpoint, folder, 'me/x', 'mit')
    assert listing(folder) == before


def test_an_export_replaces_its_own_files_until_they_are_changed(tmp_path, checkpoint):
    folder = hub.export_folder(checkpoint, tmp_path/'out', 'me/x', 'mit')
    (folder/'notes.txt').write_text('mine')
    results = save_results(tmp_path/'results.json', 'agft eval m.safetensors')
    hub.export_folder(checkpoint, folder, 'me/x', 'mit', results=results)
    assert '80.0' in (folder/'README.md').read_text() and (folder/'notes.txt').read_text() == 'mine'
    (folder/'README.md').write_text('edited')
    before = listing(folder)
    with pytest.raises(AgftError, match='README.md.*not replaced'):
        hub.export_folder(checkpoint, folder, 'me/x', 'mit')
    assert listing(folder) == before


def test_a_checkpoint_stays_where_it_lies(tmp_path, checkpoint):
    folder = tmp_path/'here'
    folder.mkdir()
    own = checkpoint.rename(folder/'open_clip_model.safetensors')
    content, link = own.read_bytes(), tmp_path/'link.safetensors'
    link.symlink_to(own)
    for source in (own, link):
        hub.export_folder(source, folder, 'me/x', 'mit')
        assert own.read_bytes() == content and not own.is_symlink()
    same_logits(load_model(own), open_clip.create_model(f'local-dir:{folder}'))


def test_a_file_in_place_of_the_folder_is_refused(tmp_path, checkpoint):
    content = checkpoint.read_bytes()
    for folder in (checkpoint, checkpoint/'below'):
        with pytest.raises(AgftError, match='is a file|cannot be'):
            hub.export_folder(checkpoint, folder, 'me/x', 'mit')
    (tmp_path/'list').mkdir()
    (tmp_path/'list'/'.agft-export.json').write_text('[]')
    with pytest.raises(AgftError, match='not of agft export'):
        hub.export_folder(checkpoint, tmp_path/'list', 'me/x', 'mit')
    assert checkpoint.read_bytes() == content
