# ESeg-M: EfficientNet-B4 (1.4, 1.8), BiFPN with 192 channels, 5 repeats.
_base_ = './eseg-s.py'  # everything else
checkpoint_file = 'https://download.openmmlab.com/mmclassification/v0/efficientnet/efficientnet-b4_3rdparty_8xb32-aa_in1k_20220119-45b8bd2b.pth'
model = dict(
    backbone=dict(width=1.4, depth=1.8, init_cfg=dict(checkpoint=checkpoint_file)),
    neck=dict(in_channels=[32, 56, 160, 448], channels=192, num_repeats=5),
    decode_head=dict(in_channels=[192] * 8, channels=192))
