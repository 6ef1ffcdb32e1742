_base_ = [
    '../_base_/models/hfgd_r50.py',  # HFGD with ResNet-50
    '../_base_/datasets/pascal_context_59_513x513_brightness.py',  # 59 classes, batch 4 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_30k_wd1e-4.py'  # SGD, lr 0.01, wd 1e-4, 30k
]
crop_size = (513, 513)
data_preprocessor = dict(size=crop_size, test_cfg=dict(size=crop_size))
# The encoder alone, at output stride 32, and its self-attention regularized.
norm_cfg = dict(type='SyncBN', eps=1e-3, requires_grad=True)
model = dict(
    type='CAREncoderDecoder',
    car=dict(layer='out_conv'),
    data_preprocessor=data_preprocessor,
    decode_head=dict(
        _delete_=True,
        type='ContextAugmentedEncoder',
        in_channels=2048,
        in_index=3,
        channels=256,
        wide_channels=2048,
        attention_channels=512,
        qk_channels=64,
        dropout_ratio=0.,
        num_classes=59,
        norm_cfg=norm_cfg,
        align_corners=True,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)))
