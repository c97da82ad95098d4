"Settings of the pre-training, and models that are shared: a card and a folder that open_clip loads."
import os
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import yaml
from torchvision.transforms import Compose

from agft import hub
from agft.config import PretrainConfig, Recipe, build, load_preset, override
from agft.core import AgftError, read_json, seeded, write_json
from agft.evaluation import Flags
from agft.model import add_learned_input, fingerprint
from agft.pretrain import pretrain
from agft.results import Results, summarise
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
    for recipe, words in [(override(photo, **{'model.name': 'ViT-B-32'}), 'ViT-B-32.*agft-tiny, agft-photo'),
                          (build(Recipe, {}), 'agft-tiny has no .*pretrain'),
                          (photo, 'clip_text_vitb32.*AGFT_DATA')]:
        with pytest.raises(AgftError, match=words):
            pretrain(recipe, out, device='cpu')
    assert not out.exists()


def test_pretrain_records_its_settings_and_continues(tmp_path, capsys):
    short = {f'pretrain.{part}.{key}': 2 if key == 'steps' else 16
             for part in ('text', 'image') for key in ('steps', 'batch_size')}
    recipe, out = override(load_preset('tiny'), **short), tmp_path/'out'
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


@pytest.fixture
def checkpoint(tmp_path, architectures):
    "A small random model, in an architecture from a JSON file, as a checkpoint of a fine-tuning run."
    architectures({'agft-test': SMALL})
    torch.manual_seed(0)
    model = new_model('agft-test')
    for p in model.parameters():
        p += .02*torch.randn(p.shape)
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
    assert 'agft.weights.load_model(' not in text


def test_a_card_without_results_claims_nothing(checkpoint):
    card = hub.model_card(checkpoint, repo_id='me/x', licence='mit')
    assert 'No numbers' in card and 'No evaluation' in card and 'base_model' not in card


def test_the_card_of_a_small_model_registers_its_architecture(tmp_path):
    save_model(load_model('agft-tiny'), tmp_path/'m.safetensors')
    card = hub.model_card(tmp_path/'m.safetensors', repo_id='me/x', licence='mit')
    assert 'import agft.weights' in card and "agft.weights.load_model('agft-tiny').tokenizer" in card


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
