_base_ = [
    '../_base_/models/deeplabv3plus_xception65-d16.py',  # DeepLabV3+ with Xception-65, output stride 16
    '../_base_/datasets/ade20k_513x513.py',  # ADE20K, 150 classes, batch 4 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_160k.py'  # SGD, lr 0.01, wd 5e-4
]
crop_size = (513, 513)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    decode_head=dict(num_classes=150))
optim_wrapper = dict(optimizer=dict(lr=2e-3, weight_decay=4e-5))
# The thesis halves the rate by hand, about every 30000 iterations.
param_scheduler = [
    dict(
        type='MultiStepLR',
        milestones=[30000, 60000, 90000, 120000, 150000],
        gamma=0.5,
        begin=0,
        end=160000,
        by_epoch=False)
]
