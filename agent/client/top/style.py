"""The colours of `udpwatch top`. Colours are muted; only wrong replies and errors are bright.

With NO_COLOR, the selected row is in reverse video and emphasised text is bold.
"""

CSS = """
Screen { background: #10151b; color: #c6ced6; layout: vertical; }

#banner { height: 3; background: #18202a; }
#heading { height: 1; background: #202b37; }
#rows { height: 1fr; background: #10151b; }
#keys { height: 1; background: #18202a; }
#detail { display: none; background: #141b23; border-top: solid #39506a; border-title-color: #e6edf3; }
#filter { display: none; height: 1; background: #202b37; color: #e6edf3; border: none; padding: 0 1; }

Help { align: center middle; background: #10151b 60%; }
#help { width: 100%; max-width: 100; height: 100%; max-height: 26; background: #18202a; border: round #39506a;
        padding: 0 1; }

TextPane, RowTable {
    & > .name { color: #e6edf3; text-style: bold; }
    & > .fact { color: #c6ced6; }
    & > .label { color: #7d8b99; }
    & > .live { color: #6fbf8b; }
    & > .paused { color: #d9b45b; text-style: bold; }
    & > .error { color: #ef7b6b; text-style: bold; }
    & > .wrong { color: #f0a05a; text-style: bold; }
    & > .graph { color: #f0a05a; }
    & > .heading { color: #93a3b3; }
    & > .heading-sorted { color: #e6edf3; text-style: bold; }
    & > .key { color: #8db7e0; text-style: bold; }
    & > .quiet { color: #8a97a3; }
    & > .node { color: #c6ced6; }
    & > .process { color: #e6edf3; text-style: bold; }
    & > .location { color: #a9c7e8; }
    & > .port { color: #c6ced6; }
    & > .asked { color: #8fcfa5; }
    & > .replied { color: #f0a05a; }
    & > .verdict { color: #c6ced6; }
    & > .cause { color: #a3b0bc; }
    & > .rate { color: #e6edf3; text-style: bold; }
    & > .total { color: #c6ced6; }
    & > .last { color: #8a97a3; }
    & > .selected { background: #2a3d52; }
    &:nocolor > .selected { text-style: reverse; }
}
"""
