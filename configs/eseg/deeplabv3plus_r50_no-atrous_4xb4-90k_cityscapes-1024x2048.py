# No atrous convolution: output stride 32, and no rates.
_base_ = [
    '../_base_/models/deeplabv3plus_r50-d8.py',  # DeepLabV3+, here with output stride 32
    '../_base_/datasets/cityscapes_1024x2048.py',  # four crops of 1024 x 2048 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_90k_cosine-ema.py'  # SGD, cosine decay, EMA
]
crop_size = (1024, 2048)
# Momentum as in the other rows; the pretrained weights want their own eps in the backbone.
norm_cfg = dict(type='SyncBN', momentum=0.01, requires_grad=True)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    pretrained='torchvision://resnet50',
    # The plain stem of 7x7: with it, the counts of the BiFPN row are the published ones.
    backbone=dict(type='ResNet', norm_cfg=norm_cfg, strides=(1, 2, 2, 2), dilations=(1, 1, 1, 1)),
    decode_head=dict(
        channels=256,
        norm_cfg=dict(eps=1e-3, **norm_cfg),
        # A branch of rate 1 is a 1x1 convolution in this head.
        dilations=(1, 1, 1, 1),
        sampler=dict(type='OHEMPixelSampler', thresh=0.7, min_kept=131072)),
    auxiliary_head=None)
