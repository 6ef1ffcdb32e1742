# Pyramid pooling, the baseline of GFF.
_base_ = [
    '../_base_/models/r18-d8.py',  # ResNet-18 at output stride 8, from scratch
    '../_base_/datasets/camvid.py',  # 367 training images in data/camvid
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_4k.py'  # AdamW, 4000 iterations
]
crop_size = (360, 480)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    decode_head=dict(
        type='PSPHead',
        pool_scales=(1, 2, 3, 6),
        channels=128,
        num_classes=11),
    auxiliary_head=dict(num_classes=11))
