# ASPP, the baseline of KSAC.
# As far, beside the map of 12 x 15, as the paper's 6, 12 and 18 on its maps of 33 x 33.
_base_ = [
    '../_base_/models/lite0.py',  # EfficientNet-Lite0, pretrained on ImageNet, here at output stride 16
    '../_base_/datasets/camvid_180x240.py',  # 367 training images in data/camvid, at half size
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_1k_pretrained.py'  # AdamW, 1000 iterations
]
crop_size = (180, 240)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(output_stride=16),
    decode_head=dict(type='ASPPHead', dilations=(1, 2, 4, 6)))
