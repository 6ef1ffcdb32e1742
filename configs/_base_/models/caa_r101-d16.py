# CAA with ResNet-101, output stride 16, multi-grid 1, 2, 4.
norm_cfg = dict(type='SyncBN', requires_grad=True)
head_norm_cfg = dict(type='SyncBN', eps=1e-3, requires_grad=True)
data_preprocessor = dict(
    type='SegDataPreProcessor',
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    pad_val=0,
    seg_pad_val=255)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=data_preprocessor,
    pretrained='open-mmlab://resnet101_v1c',
    backbone=dict(
        type='ResNetV1c',
        depth=101,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        strides=(1, 2, 2, 1),
        dilations=(1, 1, 1, 2),
        # The dilations of the last stage's blocks: its own, 2, times 1, 2, 4. MMSegmentation puts
        # these numbers in the place of the stage's dilation, it does not multiply them with it.
        multi_grid=(2, 4, 8),
        contract_dilation=True,
        style='pytorch',
        norm_cfg=norm_cfg,
        norm_eval=False),
    decode_head=dict(
        type='CAAHead',
        in_channels=2048,
        in_index=3,
        channels=256,
        attention='channelized_axial',
        attention_channels=512,
        qk_channels=64,
        gate_channels=128,
        gate_layers=5,
        image_level=True,
        dropout_ratio=0.1,
        num_classes=19,
        norm_cfg=head_norm_cfg,
        align_corners=True,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    # As in the authors' code: a 1x1 convolution on the last feature, not a 3x3 on the one before.
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=2048,
        in_index=3,
        channels=256,
        num_convs=1,
        kernel_size=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=19,
        norm_cfg=head_norm_cfg,
        align_corners=True,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4)),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
