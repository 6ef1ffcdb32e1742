_base_ = [
    '../_base_/models/caa_r101-d16.py',  # ResNet-101, output stride 16
    '../_base_/datasets/pascal_context_59_513x513.py',  # 59 classes, batch 4 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_40k_wd1e-4.py'  # SGD, lr 0.01 falling to 0
]
crop_size = (513, 513)
data_preprocessor = dict(size=crop_size, test_cfg=dict(size=crop_size))
model = dict(
    data_preprocessor=data_preprocessor,
    decode_head=dict(num_classes=59),
    auxiliary_head=None)  # the ablations train without
