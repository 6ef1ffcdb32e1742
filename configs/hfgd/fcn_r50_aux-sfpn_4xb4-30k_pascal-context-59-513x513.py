_base_ = [
    '../_base_/models/hfgd_r50.py',  # HFGD with ResNet-50
    '../_base_/datasets/pascal_context_59_513x513_brightness.py',  # 59 classes, batch 4 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_30k_wd1e-4.py'  # SGD, lr 0.01, wd 1e-4, 30k
]
crop_size = (513, 513)
data_preprocessor = dict(size=crop_size, test_cfg=dict(size=crop_size))
norm_cfg = dict(type='SyncBN', eps=1e-3, requires_grad=True)
model = dict(
    data_preprocessor=data_preprocessor,
    # What is measured is the FCN on the backbone's last level,
    decode_head=dict(
        _delete_=True,
        type='FCNHead',
        in_channels=2048,
        in_index=3,
        channels=512,
        num_convs=2,
        concat_input=False,
        dropout_ratio=0.,
        num_classes=59,
        norm_cfg=norm_cfg,
        align_corners=True,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    # beside an upsampler that trains the backbone.
    auxiliary_head=dict(
        type='SemanticFPNHead',
        in_channels=[256, 512, 1024, 2048],
        in_index=[0, 1, 2, 3],
        channels=256,
        dropout_ratio=0.,
        num_classes=59,
        norm_cfg=norm_cfg,
        align_corners=True,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)))
