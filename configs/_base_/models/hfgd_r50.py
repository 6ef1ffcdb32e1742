# HFGD with ResNet-50 at output stride 32: CAE, U-SFPN, guidance and axial attention. A config adds
# the class-aware regularization of CAE: type='CAREncoderDecoder', car=dict(layer='encoder.out_conv')
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
    pretrained='open-mmlab://resnet50_v1c',
    backbone=dict(
        type='ResNetV1c',
        depth=50,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        strides=(1, 2, 2, 2),
        dilations=(1, 1, 1, 1),
        contract_dilation=True,
        style='pytorch',
        norm_cfg=norm_cfg,
        norm_eval=False),
    decode_head=dict(
        type='HFGDHead',
        in_channels=[256, 512, 1024, 2048],
        in_index=[0, 1, 2, 3],
        channels=256,
        upsampler=dict(type='USFPNHead'),
        encoder=dict(
            type='ContextAugmentedEncoder',
            wide_channels=2048,
            attention_channels=512,
            qk_channels=64),
        guidance=True,
        axial_attention=True,
        stop_gradient=True,
        dropout_ratio=0.,
        num_classes=19,
        norm_cfg=head_norm_cfg,
        align_corners=True,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
