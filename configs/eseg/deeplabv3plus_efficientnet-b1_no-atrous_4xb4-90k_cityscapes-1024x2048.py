# No atrous convolution: output stride 32, and no rates.
_base_ = [
    '../_base_/models/deeplabv3plus_efficientnet-b1-d16.py',
    '../_base_/datasets/cityscapes_1024x2048.py',  # four crops of 1024 x 2048 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_90k_cosine-ema.py'  # SGD, cosine decay, EMA
]
crop_size = (1024, 2048)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(output_stride=32),
    decode_head=dict(
        # A branch of rate 1 is a 1x1 convolution in this head.
        dilations=(1, 1, 1, 1)))
