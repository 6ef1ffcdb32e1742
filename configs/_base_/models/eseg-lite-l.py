# ESeg-Lite-L: BiFPN with 96 channels, 3 repeats.
_base_ = './eseg-lite-s.py'  # everything else
model = dict(
    backbone=dict(width=1.0, depth=1.0),
    neck=dict(in_channels=[24, 40, 112, 320], channels=96, num_repeats=3),
    decode_head=dict(in_channels=[96] * 8, channels=96))
