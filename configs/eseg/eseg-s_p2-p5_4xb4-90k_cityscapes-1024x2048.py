# Levels P2 to P5 instead of P2 to P9.
_base_ = [
    '../_base_/models/eseg-s.py',  # ESeg-S
    '../_base_/datasets/cityscapes_1024x2048.py',  # four crops of 1024 x 2048 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_90k_cosine-ema.py'  # SGD, cosine decay, EMA
]
crop_size = (1024, 2048)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    neck=dict(num_levels=4),
    decode_head=dict(in_channels=[96] * 4, in_index=list(range(4))))
