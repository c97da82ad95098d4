"Workflows, templates and the citation file, as far as they can be checked without a network."
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
GITHUB = ROOT/'.github'
WORKFLOWS = sorted((GITHUB/'workflows').glob('*.yaml'))
FORMS = sorted(set((GITHUB/'ISSUE_TEMPLATE').glob('*.yml')) - {GITHUB/'ISSUE_TEMPLATE'/'config.yml'})
NODE_24 = {  # the first major version of each action that runs on Node 24, or needs no Node
    'actions/checkout': 5, 'actions/setup-python': 6, 'actions/configure-pages': 6, 'actions/deploy-pages': 5,
    'actions/upload-pages-artifact': 5, 'actions/upload-artifact': 6, 'actions/download-artifact': 7,
    'quarto-dev/quarto-actions/setup': 2, 'pypa/gh-action-pypi-publish': 1}
each_workflow = pytest.mark.parametrize('file', WORKFLOWS, ids=lambda file: file.stem)


def settings():
    "The section of settings.ini."
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']


def jobs(file):
    "The jobs of a workflow."
    return yaml.safe_load(file.read_text(encoding='utf-8'))['jobs']


def steps(file):
    "The steps of all jobs of a workflow."
    return [step for job in jobs(file).values() for step in job['steps']]


def commands(file):
    "The command lines of a workflow."
    return [line for step in steps(file) for line in step.get('run', '').splitlines()]


SCHEMAS = {'github-workflows': WORKFLOWS, 'github-issue-forms': FORMS,
           'github-issue-config': [GITHUB/'ISSUE_TEMPLATE'/'config.yml'],
           'dependabot': [GITHUB/'dependabot.yml'], 'citation-file-format': [ROOT/'CITATION.cff']}


@pytest.mark.parametrize('schema', SCHEMAS)
def test_files_follow_their_schema(schema):
    assert SCHEMAS[schema]
    check = [sys.executable, '-m', 'check_jsonschema', '--builtin-schema', f'vendor.{schema}']
    done = subprocess.run([*check, *SCHEMAS[schema]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@each_workflow
def test_actions_run_today(file):
    used = [step['uses'] for step in steps(file) if 'uses' in step]
    assert used
    for action in used:
        name, version = action.split('@')
        major = re.search(r'\d+', version)
        assert major and int(major[0]) >= NODE_24[name], action


@each_workflow
def test_jobs_have_limits_and_few_rights(file):
    workflow = yaml.safe_load(file.read_text(encoding='utf-8'))
    assert workflow['permissions']['contents'] == 'read'
    for name, job in workflow['jobs'].items():
        assert job['timeout-minutes'] <= 60, name
        writes = [right for right, level in job.get('permissions', {}).items() if level == 'write']
        assert writes in ([], ['id-token']), name


def pins(text):
    "The exact versions of torch and torchvision that commands name."
    return set(re.findall(r'\b(torch|torchvision)==([\d.]+)', text))


def test_one_pair_of_torch_and_torchvision_from_one_index():
    ci = (ROOT/'.ci/run').read_text(encoding='utf-8')
    pair = pins(ci)
    assert {name for name, _ in pair} == {'torch', 'torchvision'} and len(pair) == 2
    installs = [line for file in WORKFLOWS for line in commands(file) if re.search(r'install torch', line)]
    assert len(installs) >= 4
    for line in installs:
        assert line.endswith('--index-url https://download.pytorch.org/whl/cpu') and 'torchvision' in line
        assert pins(line) in (pair, set()), line
    assert {pin for file in WORKFLOWS for pin in pins(file.read_text(encoding='utf-8'))} == pair


def test_every_python_is_tested():
    tested, = (job['strategy']['matrix']['python'] for job in jobs(GITHUB/'workflows/test.yaml').values()
               if 'strategy' in job)
    assert tested == settings()['pythons'].split()


def test_lower_bounds_are_tested():
    job = jobs(GITHUB/'workflows/test.yaml')['lower-bounds']
    assert any('--resolution lowest-direct' in step.get('run', '') for step in job['steps'])
    python, = (step for step in job['steps'] if 'setup-python' in step.get('uses', ''))
    assert python['with']['python-version'] == settings()['min_python']


def test_quarto_is_pinned():
    quarto, = (step for step in steps(GITHUB/'workflows/deploy.yaml') if 'quarto' in step.get('uses', ''))
    assert re.fullmatch(r'1\.\d+\.\d+', quarto['with']['version'])


def test_a_tag_publishes_without_a_token():
    file = GITHUB/'workflows/release.yaml'
    publish = jobs(file)['publish']
    assert publish['if'] == "github.ref_type == 'tag'" and publish['permissions'] == {'id-token': 'write'}
    assert publish['environment']['name'] == 'pypi' and publish['needs'] == 'build'
    assert 'password' not in file.read_text(encoding='utf-8')
    assert any(line.startswith('twine check --strict') for line in commands(file))


def test_templates_ask_for_what_a_number_needs():
    assert {form.stem for form in FORMS} == {'bug', 'question', 'wrong_number'}
    text = (GITHUB/'ISSUE_TEMPLATE'/'wrong_number.yml').read_text(encoding='utf-8')
    for word in ('command', 'threat', 'seeds', 'resolution'):
        assert word in text.lower(), word
    assert (GITHUB/'PULL_REQUEST_TEMPLATE.md').is_file()


def test_citation_names_this_version():
    cited, cfg = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8')), settings()
    assert cited['version'] == cfg['version'] and cited['repository-code'] == cfg['git_url']
    changes = (ROOT/'CHANGELOG.md').read_text(encoding='utf-8')
    assert f"## [{cfg['version']}] - {cited['date-released']}\n" in changes
    paper, = cited['references']
    assert paper['url'] == 'https://arxiv.org/abs/2603.29410'
    names = [author['family-names'] for author in paper['authors']]
    readme = (ROOT/'README.md').read_text(encoding='utf-8')
    assert paper['title'] in readme and all(name in readme for name in names)
