# ESeg-L: EfficientNet-B7 (2.0, 3.1), BiFPN with 288 channels, 6 repeats.
_base_ = './eseg-s.py'  # everything else
checkpoint_file = 'https://download.openmmlab.com/mmclassification/v0/efficientnet/efficientnet-b7_3rdparty_8xb32-aa_in1k_20220119-bf03951c.pth'
model = dict(
    backbone=dict(width=2.0, depth=3.1, init_cfg=dict(checkpoint=checkpoint_file)),
    neck=dict(in_channels=[48, 80, 224, 640], channels=288, num_repeats=6),
    decode_head=dict(in_channels=[288] * 8, channels=288))
