"Draw nbs/social-card.png, which other sites show beside a link to this one: python tools/social_card.py"
from configparser import ConfigParser
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import Circle, FancyBboxPatch

ROOT = Path(__file__).resolve().parent.parent
BLUE, WHITE = '#0072b2', '#ffffff'


def draw(title:str, text:str):
    "The mark of the favicon, an image and the ball around it, beside title and text; 1200 by 630 pixels."
    fig = plt.figure(figsize=(12, 6.3), facecolor=BLUE)
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 1200), ylim=(0, 630))
    ax.axis('off')
    box = FancyBboxPatch((110, 215), 200, 200, boxstyle='round,pad=0,rounding_size=22', fill=False,
                         ec=WHITE, lw=20)
    ax.add_patch(box)
    ax.add_patch(Circle((210, 315), 38, color=WHITE))
    ax.text(400, 330, title, color=WHITE, size=92, weight='bold', va='bottom')
    ax.text(404, 310, text, color=WHITE, size=24, va='top', linespacing=1.4)
    return fig


if __name__ == '__main__':
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    cfg = ini['DEFAULT']
    words = cfg['description'].split(' without ')
    draw(cfg['title'], '\nwithout '.join(words)).savefig(ROOT/'nbs/social-card.png', dpi=100)
