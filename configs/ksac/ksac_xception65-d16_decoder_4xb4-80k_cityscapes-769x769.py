_base_ = [
    '../_base_/models/ksac_xception65-d16.py',  # KSAC with Xception-65 and decoder, output stride 16
    '../_base_/datasets/cityscapes_769x769_ksac.py',  # scales in steps, flip and crop; batch 2 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_80k.py'  # SGD, lr 0.01, wd 5e-4
]
crop_size = (769, 769)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    decode_head=dict(num_classes=19))
optim_wrapper = dict(optimizer=dict(lr=7e-3, weight_decay=4e-5))
param_scheduler = [
    dict(type='PolyLR', eta_min=0., power=0.9, begin=0, end=80000, by_epoch=False)
]
train_dataloader = dict(batch_size=4, num_workers=4)
