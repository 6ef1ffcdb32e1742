_base_ = [
    '../_base_/models/unet_s5-d16.py',  # U-Net, from scratch
    '../_base_/datasets/fusion_shapes.py',  # 512 training scenes, 64 held out
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_1k.py'  # AdamW, 1000 iterations
]
crop_size = (128, 128)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    decode_head=dict(num_classes=8),
    auxiliary_head=dict(num_classes=8))
