_base_ = [
    '../_base_/models/upernet_r18.py',  # UPerNet with ResNet-18, from scratch
    '../_base_/datasets/fusion_shapes.py',  # 512 training scenes, 64 held out
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_1k.py'  # AdamW, 1000 iterations
]
crop_size = (128, 128)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    # Half the width of the base: two CPU cores are enough for a trial.
    decode_head=dict(channels=64, num_classes=8),
    auxiliary_head=dict(channels=32, num_classes=8))
