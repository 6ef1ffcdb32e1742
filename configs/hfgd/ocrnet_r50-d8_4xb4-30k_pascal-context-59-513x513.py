_base_ = [
    '../_base_/models/fcn_r50-d8.py',  # FCN with ResNet-50, output stride 8
    '../_base_/datasets/pascal_context_59_513x513_brightness.py',  # 59 classes, batch 4 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_30k_wd1e-4.py'  # SGD, lr 0.01, wd 1e-4, 30k
]
crop_size = (513, 513)
data_preprocessor = dict(size=crop_size, test_cfg=dict(size=crop_size))
norm_cfg = dict(type='SyncBN', eps=1e-3, requires_grad=True)
model = dict(
    type='CascadeEncoderDecoder',
    num_stages=2,
    data_preprocessor=data_preprocessor,
    backbone=dict(multi_grid=(4, 8, 16)),  # 4 times 1, 2, 4
    decode_head=[
        # The coarse prediction that gives the classes their regions.
        dict(
            type='FCNHead',
            in_channels=1024,
            in_index=2,
            channels=256,
            num_convs=1,
            concat_input=False,
            dropout_ratio=0.,
            num_classes=59,
            norm_cfg=norm_cfg,
            align_corners=True,
            loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4)),
        dict(
            type='OCRHead',
            in_channels=2048,
            in_index=3,
            channels=512,
            ocr_channels=256,
            dropout_ratio=0.,
            num_classes=59,
            norm_cfg=norm_cfg,
            align_corners=True,
            loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    ],
    auxiliary_head=None)
