"The drawn world: how many images can be asked for."
import pytest

from agft.core import AgftError, seeded
from agft.world import WORLD_TASKS, sample, world_task

@pytest.mark.parametrize('n', [0, -1, 10**6 + 1, 10**12, 2**70, 1.5, '3', None])
@pytest.mark.parametrize('name', [WORLD_TASKS[0], WORLD_TASKS[-1]])
def test_a_number_of_images_that_cannot_be_drawn_is_refused_at_once(n, name):
    for make in (lambda: world_task(name, n), lambda: sample(n, seeded(0))):
        with pytest.raises(AgftError, match='images asked for; allowed: 1 to 1000000'):
            make()
