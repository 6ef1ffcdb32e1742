# ESeg-Lite-M: BiFPN with 80 channels, 2 repeats.
_base_ = './eseg-lite-s.py'  # everything else
model = dict(
    backbone=dict(width=0.6, depth=1.0),
    neck=dict(in_channels=[16, 24, 64, 192], channels=80, num_repeats=2),
    decode_head=dict(in_channels=[80] * 8, channels=80))
